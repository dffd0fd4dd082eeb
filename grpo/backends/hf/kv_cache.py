"""Keys and values of what is being decoded: each live prompt once, and behind it what each of its completions wrote.

Where prompts are short, rows begin with a copy of theirs instead: reading it with the row is then cheaper than apart.
Completions are *rows*, and live rows are always the first ``len(rows)`` of their buffers, so that attention reads a
view and never a copy: where a row ends, the last one moves into its place. The buffers are allocated once, bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

CLEARED_AT_ONCE = 64  # tokens of every row
SHORT_PROMPT = 32  # tokens; up to here rows begin with a copy of their prompt


@dataclass(frozen=True)
class Shape:
    """How many prompts of how many tokens, and rows of how many tokens, the buffers hold.

    ``row_tokens`` counts ``head_tokens``: what a row begins with, its prompt if that is short.
    """

    prompts: int
    prompt_tokens: int
    rows: int
    row_tokens: int

    @property
    def head_tokens(self) -> int:
        return head_tokens(self.prompt_tokens)

    def tokens(self) -> int:
        return self.prompts * self.prompt_tokens + self.rows * self.row_tokens


def head_tokens(longest_prompt: int) -> int:
    return longest_prompt if longest_prompt <= SHORT_PROMPT else 0


@dataclass
class Layer:
    """One attention layer's buffers: keys and values of prompts (U, kv heads, P, D) and of rows (R, kv heads, C, D)."""

    prompt_keys: torch.Tensor
    prompt_values: torch.Tensor
    row_keys: torch.Tensor
    row_values: torch.Tensor

    @classmethod
    def empty(cls, shape: Shape, key: torch.Tensor, value: torch.Tensor) -> Layer:
        """Buffers for what looks like ``key`` and ``value`` (B, kv heads, T, D)."""

        def like(x: torch.Tensor, n: int, tokens: int) -> torch.Tensor:
            return x.new_empty((n, x.shape[1], tokens, x.shape[3]))

        prompts = (like(x, shape.prompts, shape.prompt_tokens).zero_() for x in (key, value))
        return cls(*prompts, *(like(x, shape.rows, shape.row_tokens) for x in (key, value)))

    def clear_rows(self, start: int, end: int) -> None:
        """What is masked must still be finite, or nan comes of it."""
        self.row_keys[:, :, start:end] = 0
        self.row_values[:, :, start:end] = 0

    def resize_rows(self, shape: Shape, kept: int, length: int) -> None:
        for name in ("row_keys", "row_values"):
            old = getattr(self, name)
            new = old.new_empty(shape.rows, old.shape[1], shape.row_tokens, old.shape[3])
            new[:kept, :, :length] = old[:kept, :, :length]
            new[kept:, :, :length] = 0
            setattr(self, name, new)


@dataclass
class Prefill:
    """Where the keys and values of a padded batch of prompts (with a preempted row's own tokens behind) belong."""

    prompts: list[tuple[int, int, int]] = field(default_factory=list)  # place in the batch, prompt slot, length
    tails: list[tuple[int, int, int, int]] = field(default_factory=list)  # place in the batch, row, start, length


class DecodeCache:
    """The buffers of every layer, and which rows and prompts are live.

    Attention layers (``attention.py``) call ``file_away`` during a prefill, from ``begin_prefill`` to the end of the
    forward pass, and ``append`` during a decoding step, which ``begin_step`` opens.
    """

    def __init__(self, shape: Shape, device: torch.device):
        self.shape = shape
        self.device = device
        self.layers: dict[int, Layer] = {}
        self.prompt_lengths: list[int] = []  # of live prompts, by slot
        self.row_prompt: list[int] = []  # of live rows: the slot of their prompt
        self.row_lengths: list[int] = []  # and how many tokens they hold
        self.cleared = 0  # tokens of every row whose memory was written; the rest is not touched before it is needed
        self.prefill: Prefill | None = None
        self.step: Step | None = None

    @property
    def longest(self) -> int:
        return max(self.row_lengths, default=0)

    def add_prompt(self, length: int) -> int:
        self.prompt_lengths.append(length)
        return len(self.prompt_lengths) - 1

    def add_row(self, prompt: int, length: int = 0) -> int:
        """A row that has written ``length`` tokens."""
        self.row_prompt.append(prompt)
        self.row_lengths.append(length + (self.prompt_lengths[prompt] if self.shape.head_tokens else 0))
        return len(self.row_lengths) - 1

    def remove_rows(self, rows: Iterable[int]) -> Callable[[list], None]:
        """Free rows; the last live ones move into their places. Returns what moves a list's entries the same way."""
        moves = _Moves(len(self.row_lengths), set(rows))
        self._move(moves.pairs, self.longest, "row_keys", "row_values")
        moves(self.row_prompt)
        moves(self.row_lengths)
        return moves

    def remove_prompts(self, prompts: Iterable[int]) -> Callable[[list], None]:
        """The same for prompts that have no rows left."""
        gone = set(prompts)
        moves = _Moves(len(self.prompt_lengths), gone)
        self._move(moves.pairs, max(self.prompt_lengths, default=0), "prompt_keys", "prompt_values")
        new_slot = dict(moves.pairs)
        self.row_prompt = [new_slot.get(slot, slot) for slot in self.row_prompt]
        moves(self.prompt_lengths)
        return moves

    def _move(self, pairs: list[tuple[int, int]], length: int, *names: str) -> None:
        if not pairs:
            return
        source, target = (torch.tensor(side, device=self.device) for side in zip(*pairs, strict=True))
        for layer in self.layers.values():
            for name in names:
                buffer = getattr(layer, name)[:, :, :length]
                buffer[target] = buffer[source]

    def resize_rows(self, shape: Shape) -> None:
        """Other numbers of rows and of tokens a row; what live rows wrote is kept."""
        self.shape = shape
        self.cleared = self.longest
        for layer in self.layers.values():
            layer.resize_rows(shape, len(self.row_lengths), self.longest)

    def begin_prefill(self, prefill: Prefill) -> None:
        """Before a forward pass over prompts; rows that come with tokens of their own have been added."""
        if prefill.tails:
            self.clear_to(self.longest)
        self.prefill = prefill

    def begin_rows(self, rows: list[int]) -> None:
        """Rows of computed prompts, with nothing written yet: where prompts are short, they begin with a copy."""
        if self.shape.head_tokens:
            P = max(self.prompt_lengths)
            self.clear_to(P)
            prompt_of_rows = torch.tensor([self.row_prompt[row] for row in rows], device=self.device)
            for layer in self.layers.values():
                layer.row_keys[rows, :, :P] = layer.prompt_keys[prompt_of_rows, :, :P]
                layer.row_values[rows, :, :P] = layer.prompt_values[prompt_of_rows, :, :P]

    def file_away(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a prefill's keys and values (B, kv heads, T, D) of layer ``index``."""
        assert self.prefill is not None
        if index not in self.layers:
            self.layers[index] = Layer.empty(self.shape, key, value)
        layer = self.layers[index]
        for place, slot, length in self.prefill.prompts:
            layer.prompt_keys[slot, :, :length] = key[place, :, :length]
            layer.prompt_values[slot, :, :length] = value[place, :, :length]
        for place, row, start, length in self.prefill.tails:
            first, end = 0 if self.shape.head_tokens else start, start + length
            layer.row_keys[row, :, : end - first] = key[place, :, first:end]
            layer.row_values[row, :, : end - first] = value[place, :, first:end]

    def begin_step(self) -> Step:
        """Before a forward pass of one token for every live row: where it is written and who reads what."""
        self.step = Step.of(self)
        self.grow()
        return self.step

    def grow(self) -> None:
        """Every live row is about to write a token."""
        self.clear_to(self.longest + 1)
        self.row_lengths = [length + 1 for length in self.row_lengths]

    def clear_to(self, length: int) -> None:
        """Make the memory of every row's first ``length`` tokens one that may be read."""
        while self.cleared < length:
            end = min(self.cleared + CLEARED_AT_ONCE, self.shape.row_tokens)
            for layer in self.layers.values():
                layer.clear_rows(self.cleared, end)
            self.cleared = end

    def append(self, index: int, key: torch.Tensor, value: torch.Tensor) -> Layer:
        """Write the step's token of every live row (B, kv heads, 1, D) into layer ``index``."""
        assert self.step is not None
        layer, step = self.layers[index], self.step
        if step.row_mask_BC is None:  # all rows are as long: a slice, which costs a fifth of an index
            layer.row_keys[: len(step.rows_B), :, step.row_tokens - 1] = key[:, :, 0]
            layer.row_values[: len(step.rows_B), :, step.row_tokens - 1] = value[:, :, 0]
        else:
            layer.row_keys[step.rows_B, :, step.written_B] = key[:, :, 0]
            layer.row_values[step.rows_B, :, step.written_B] = value[:, :, 0]
        return layer


class _Moves:
    """Which of n entries move where when some are removed: the last ones fill the gaps, order is not kept."""

    def __init__(self, n: int, gone: set[int]):
        left = n - len(gone)
        gaps = sorted(i for i in gone if i < left)
        self.left = left
        self.pairs = list(zip((i for i in range(left, n) if i not in gone), gaps, strict=True))

    def __call__(self, entries: list) -> None:
        for source, target in self.pairs:
            entries[target] = entries[source]
        del entries[self.left :]


@dataclass(frozen=True)
class Step:
    """One decoding step of B live rows, the same for every layer. ``prompts`` is None where rows hold their own.

    Masks are added to scores, and None where nothing is masked.
    """

    rows_B: torch.Tensor
    written_B: torch.Tensor  # tokens each row held before
    positions_B: torch.Tensor  # of the new token in its sequence
    row_tokens: int  # to attend over: the longest live row, the new token included, or more
    row_mask_BC: torch.Tensor | None
    prompts: LivePrompts | None

    @classmethod
    def of(cls, cache: DecodeCache) -> Step:
        B, C = len(cache.row_lengths), cache.longest + 1
        written_B = torch.tensor(cache.row_lengths, device=cache.device)
        prompts = None if cache.shape.head_tokens else LivePrompts.of(cache)
        return cls(
            rows_B=torch.arange(B, device=cache.device),
            written_B=written_B,
            positions_B=written_B if prompts is None else prompts.lengths_B + written_B,
            row_tokens=C,
            row_mask_BC=None if min(cache.row_lengths) + 1 == C else beyond(written_B + 1, C),
            prompts=prompts,
        )


@dataclass(frozen=True)
class LivePrompts:
    """Rows arranged by prompt, so that a prompt's keys are read once for all of its rows.

    Row b stands at ``place_B[b]`` of U groups of ``group_size`` places; empty places hold a copy of the first row,
    which nobody reads.
    """

    of_B: torch.Tensor
    lengths_B: torch.Tensor  # of each row's prompt
    place_B: torch.Tensor
    row_at: torch.Tensor  # (U * group_size): the row at each place
    number: int  # U
    group_size: int
    longest: int
    mask_UP: torch.Tensor | None
    _by_kv_head: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: DecodeCache) -> LivePrompts:
        U, P = len(cache.prompt_lengths), max(cache.prompt_lengths)
        n = max(Counter(cache.row_prompt).values())
        given = (cache.prompt_lengths, cache.row_prompt, *cls.arrange(cache.row_prompt, U, n))
        lengths_U, of_B, place_B, row_at = (torch.tensor(values, device=cache.device) for values in given)
        mask_UP = None if min(cache.prompt_lengths) == P else beyond(lengths_U, P)
        return cls(of_B, lengths_U[of_B], place_B, row_at, U, n, P, mask_UP)

    @staticmethod
    def arrange(prompt_of_rows: list[int], prompts: int, group_size: int) -> tuple[list[int], list[int]]:
        """The place of each row, and the row at each place."""
        free = [slot * group_size for slot in range(prompts)]
        places, row_at = [], [0] * (prompts * group_size)
        for row, slot in enumerate(prompt_of_rows):
            places.append(free[slot])
            row_at[free[slot]] = row
            free[slot] += 1
        return places, row_at

    def places_by_kv_head(self, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Between rows (B, kv heads) and places (U, kv heads, group_size), both flat: for each place the row's entry
        that stands there, and for each row's entry its place. Made by the first layer, used by all."""
        if kv_heads not in self._by_kv_head:
            U, n, place_B = self.number, self.group_size, self.place_B
            heads = torch.arange(kv_heads, device=place_B.device)
            into = (self.row_at.view(U, 1, n) * kv_heads + heads[:, None]).flatten()
            back = (((place_B // n)[:, None] * kv_heads + heads) * n + (place_B % n)[:, None]).flatten()
            self._by_kv_head[kv_heads] = into, back
        return self._by_kv_head[kv_heads]


def beyond(lengths_N: torch.Tensor, width: int) -> torch.Tensor:
    """-inf (N,width) at and behind each length, else 0."""
    outside = torch.arange(width, device=lengths_N.device)[None] >= lengths_N[:, None]
    return torch.zeros(outside.shape, device=lengths_N.device).masked_fill_(outside, -torch.inf)
