"""Keys and values of the sequences that are being decoded.

A *sequence* is a prompt and one completion of it. The cache holds each prompt once, and for every sequence the tokens
of its completion. Where prompts are short, every sequence holds a copy of its prompt too: one longer read is then
cheaper than two. Running sequences are always the first in their buffers, so attention reads a view and never a copy.
Where one ends, the last one moves into its place. A sequence that waits for an environment's answer is parked: it keeps
its keys and values at the buffers' end, where no step computes it. The compiled step looks up where a sequence is, and
then none is moved. Buffers are allocated once, with a bound.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

import torch

from grpo.backends.hf.buffers import OF_PROMPTS, OF_SEQUENCES, Layer, Prefill
from grpo.backends.hf.step import Extension, PromptGroups, Step

CLEARED_AT_ONCE = 64  # tokens of every sequence
SHORT_PROMPT = 32  # tokens; up to here sequences begin with a copy of their prompt


@dataclass(frozen=True)
class Shape:
    """How many prompts of how many tokens, and sequences of how many tokens, the buffers hold.

    ``sequence_tokens`` counts ``head_tokens``, the copy of a short prompt that a sequence begins with. No prompt has
    more than ``group_size`` sequences.
    """

    prompts: int
    prompt_tokens: int
    sequences: int
    sequence_tokens: int
    group_size: int

    @property
    def head_tokens(self) -> int:
        return head_tokens(self.prompt_tokens)

    def holds(self, other: Shape) -> bool:
        """Whether buffers of this shape serve a rollout that wants ``other``."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return self.head_tokens == other.head_tokens and all(mine >= theirs for mine, theirs in pairs)

    def tokens(self) -> int:
        return self.prompts * self.prompt_tokens + self.sequences * self.sequence_tokens


def head_tokens(longest_prompt: int) -> int:
    return longest_prompt if longest_prompt <= SHORT_PROMPT else 0


class DecodeCache:
    """The buffers of every layer, and which sequences and prompts they hold.

    Attention layers (``attention.py``) call ``file_away`` during a prefill, which lasts from ``begin_prefill`` to the
    end of the forward pass. They call ``append`` during a decoding step, which ``begin_step`` opens, and during an
    extension, which lasts from ``begin_extension`` to the end of the forward pass.

    ``in_place``: a sequence stays in its row of the buffers, for a step that reads ``rows``.
    """

    def __init__(self, shape: Shape, device: torch.device, *, in_place: bool = False):
        self.shape = shape
        self.device = device
        self.in_place = in_place
        self.layers: dict[int, Layer] = {}
        self.prompt_lengths: list[int] = []  # by slot
        self.prompt_of: list[int] = []  # the slot of each sequence's prompt
        self.lengths: list[int] = []  # the tokens each sequence holds
        self.rows: list[int] = []  # of the buffers, in which each sequence is
        self.parked_prompt_of: list[int] = []  # the same of those that are parked
        self.parked_lengths: list[int] = []
        self.parked_rows: list[int] = []
        self._free = list(reversed(range(shape.sequences)))  # rows, where sequences stay in place
        self.cleared = 0  # tokens of every sequence whose memory was written; memory is not touched before it is needed
        self.prefill: Prefill | None = None
        self.step: Step | None = None
        self.extension: Extension | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest running sequence."""
        return max(self.lengths, default=0)

    @property
    def longest_held(self) -> int:
        """Tokens of the longest sequence, running or parked."""
        return max(self.longest, *self.parked_lengths, 0)

    def empty(self) -> None:
        """Forget all prompts and sequences. The buffers stay, for another rollout."""
        self.prompt_lengths, self.prompt_of, self.lengths, self.rows = [], [], [], []
        self.parked_prompt_of, self.parked_lengths, self.parked_rows = [], [], []
        self._free = list(reversed(range(self.shape.sequences)))
        self.prefill = self.step = self.extension = None

    def add_prompt(self, length: int) -> int:
        """Its slot."""
        self.prompt_lengths.append(length)
        return len(self.prompt_lengths) - 1

    def add_sequence(self, prompt: int, length: int = 0) -> int:
        """The place of a new sequence, whose completion has ``length`` tokens."""
        self.prompt_of.append(prompt)
        self.lengths.append(length + self._copied(prompt))
        self.rows.append(self._free.pop() if self.in_place else len(self.rows))
        return len(self.lengths) - 1

    def _copied(self, prompt: int) -> int:
        """The tokens of its prompt that a sequence begins with."""
        return self.prompt_lengths[prompt] if self.shape.head_tokens else 0

    def held(self, place: int) -> int:
        """The tokens of its completion that a running sequence holds."""
        return self.lengths[place] - self._copied(self.prompt_of[place])

    def remove_sequences(self, places: Collection[int]) -> None:
        """Others move into their places, as ``remove_entries`` does it with a list."""
        self._leave(places, self._free)
        remove_entries(self.prompt_of, places)
        remove_entries(self.lengths, places)

    def park(self, places: list[int], lengths: list[int]) -> None:
        """Running sequences leave the others and keep their keys and values, of the first ``lengths`` tokens of their
        completions. Places of the others change as in ``remove_sequences``. There must be no more sequences, running
        and parked, than the shape has."""
        prompts = [self.prompt_of[place] for place in places]
        self._leave(places, self.parked_rows, [self._parked_at(i) for i in self._next_parked(len(places))])
        self.parked_prompt_of += prompts
        self.parked_lengths += [self._copied(p) + length for p, length in zip(prompts, lengths, strict=True)]
        remove_entries(self.prompt_of, places)
        remove_entries(self.lengths, places)

    def unpark(self, parked: list[int]) -> None:
        """Parked sequences run again, behind those that do, in this order."""
        first = len(self.rows)
        self._leave_parked(parked, self.rows, list(range(first, first + len(parked))))
        self.prompt_of += [self.parked_prompt_of[p] for p in parked]
        self.lengths += [self.parked_lengths[p] for p in parked]
        self._forget_parked(parked)

    def remove_parked(self, parked: list[int]) -> None:
        """As ``remove_sequences``, of those that are parked."""
        self._leave_parked(parked, self._free)
        self._forget_parked(parked)

    def _forget_parked(self, parked: list[int]) -> None:
        remove_entries(self.parked_prompt_of, parked)
        remove_entries(self.parked_lengths, parked)

    def _parked_at(self, parked: int) -> int:
        """The row of a parked sequence, where running ones are the first: counted from the buffers' end."""
        return self.shape.sequences - 1 - parked

    def _next_parked(self, number: int) -> range:
        return range(len(self.parked_rows), len(self.parked_rows) + number)

    def _leave(self, places: Collection[int], to: list[int], rows: Sequence[int] = ()) -> None:
        """Running sequences give up their rows to the list ``to``, or, where running ones are the first, move to
        ``rows``, which are added to it; the last ones fill the gaps."""
        if self.in_place:
            to += [self.rows[place] for place in places]
            remove_entries(self.rows, places)
            return
        away = list(zip(places, rows, strict=True)) if rows else []
        self._move([*away, *moves_into_gaps(len(self.rows), places)], self.longest, *OF_SEQUENCES)
        del self.rows[len(self.rows) - len(places) :]
        to += rows

    def _leave_parked(self, parked: list[int], to: list[int], rows: Sequence[int] = ()) -> None:
        """The same of parked ones."""
        if self.in_place:
            to += [self.parked_rows[p] for p in parked]
            remove_entries(self.parked_rows, parked)
            return
        away = [(self._parked_at(p), row) for p, row in zip(parked, rows, strict=True)] if rows else []
        gaps = moves_into_gaps(len(self.parked_rows), parked)
        moves = [*away, *((self._parked_at(source), self._parked_at(target)) for source, target in gaps)]
        self._move(moves, self.longest_held, *OF_SEQUENCES)
        del self.parked_rows[len(self.parked_rows) - len(parked) :]
        to += rows

    def remove_prompts(self, slots: Collection[int]) -> None:
        """The same for prompts, which must have no sequence left."""
        moves = moves_into_gaps(len(self.prompt_lengths), slots)
        self._move(moves, max(self.prompt_lengths, default=0), *OF_PROMPTS)
        new_slot = dict(moves)
        self.prompt_of = [new_slot.get(slot, slot) for slot in self.prompt_of]
        self.parked_prompt_of = [new_slot.get(slot, slot) for slot in self.parked_prompt_of]
        remove_entries(self.prompt_lengths, slots)

    def _move(self, moves: list[tuple[int, int]], length: int, *names: str) -> None:
        if not moves:
            return
        source, target = (torch.tensor(side, device=self.device) for side in zip(*moves, strict=True))
        for layer in self.layers.values():
            for name in names:
                buffer = getattr(layer, name)[:, :, :length]
                buffer[target] = buffer[source]

    def resize_sequences(self, shape: Shape) -> None:
        """Other numbers of sequences and of tokens a sequence. What sequences wrote is kept."""
        self.shape = shape
        self.cleared = self.longest_held
        rows, running, parked = [*self.rows, *self.parked_rows], len(self.rows), len(self.parked_rows)
        self.rows = list(range(running))
        self.parked_rows = [self._parked_at(p) for p in range(parked)]
        self._free = list(reversed(range(running, shape.sequences - parked)))
        for layer in self.layers.values():
            layer.resize_sequences(shape, rows, [*self.rows, *self.parked_rows], self.longest_held)

    def begin_prefill(self, prefill: Prefill) -> None:
        """Before a forward pass over prompts. Preempted sequences that are part of it have been added."""
        if prefill.tails:
            self.clear_to(self.longest)
        self.prefill = prefill

    def begin_sequences(self, places: list[int]) -> None:
        """New sequences behind prompts that are filed: where prompts are short, copy them."""
        if self.shape.head_tokens:
            P = max(self.prompt_lengths)
            self.clear_to(P)
            slots = torch.tensor([self.prompt_of[place] for place in places], device=self.device)
            rows = [self.rows[place] for place in places]
            for layer in self.layers.values():
                layer.sequence_keys[rows, :, :P] = layer.prompt_keys[slots, :, :P]
                layer.sequence_values[rows, :, :P] = layer.prompt_values[slots, :, :P]

    def file_away(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a prefill's keys and values (B, kv heads, T, D) of layer ``index``."""
        assert self.prefill is not None
        if index not in self.layers:
            self.layers[index] = Layer.empty(self.shape, key, value)
        layer = self.layers[index]
        if self.prefill.prompts:  # all at once; what a shorter prompt has behind its end is masked
            rows_U, slots_U = self.prefill.prompt_index(key.device)
            P = max(length for _, _, length in self.prefill.prompts)
            layer.prompt_keys[slots_U, :, :P] = key[rows_U, :, :P].to(layer.prompt_keys.dtype)
            layer.prompt_values[slots_U, :, :P] = value[rows_U, :, :P].to(layer.prompt_values.dtype)
        for row, place, start, length in self.prefill.tails:
            first, end, to = 0 if self.shape.head_tokens else start, start + length, self.rows[place]
            layer.sequence_keys[to, :, : end - first] = key[row, :, first:end]
            layer.sequence_values[to, :, : end - first] = value[row, :, first:end]

    def begin_step(self) -> Step:
        """Before a forward pass over one token of every sequence. Running sequences must be the first."""
        assert not self.in_place
        self.step = Step.of(self.lengths, self._groups(self.prompt_of), self.device)
        self.grow()
        return self.step

    def begin_extension(self, places: list[int], new: list[int]) -> Extension:
        """Before a forward pass over ``new`` tokens of the running sequences at ``places``. ``extension`` is to be None
        again behind it."""
        held = [self.lengths[place] for place in places]
        groups = self._groups([self.prompt_of[place] for place in places])
        self.extension = Extension.of([self.rows[place] for place in places], held, new, groups, self.device)
        self.clear_to(self.extension.sequence_tokens)
        for place, count in zip(places, new, strict=True):
            self.lengths[place] += count
        return self.extension

    def _groups(self, prompt_of: list[int]) -> PromptGroups | None:
        """Sequences by their prompts; None where they begin with a copy."""
        return None if self.shape.head_tokens else PromptGroups.of(self.prompt_lengths, prompt_of, self.device)

    def grow(self) -> None:
        """Every sequence is about to write a token."""
        self.clear_to(self.longest + 1)
        self.lengths = [length + 1 for length in self.lengths]

    def clear_to(self, length: int) -> None:
        """Make the memory of every sequence's first ``length`` tokens safe to read."""
        while self.cleared < length:
            end = min(self.cleared + CLEARED_AT_ONCE, self.shape.sequence_tokens)
            for layer in self.layers.values():
                layer.clear_sequences(self.cleared, end)
            self.cleared = end

    def append(self, index: int, key: torch.Tensor, value: torch.Tensor) -> Layer:
        """Write the step's token of every sequence (B, kv heads, 1, D), or an extension's, into layer ``index``."""
        if self.extension is not None:
            return self._append_several(self.layers[index], self.extension, key, value)
        assert self.step is not None
        layer, step = self.layers[index], self.step
        if step.of_one_length:  # a slice, which costs a fifth of an index
            layer.sequence_keys[: len(step.sequences_B), :, step.sequence_tokens - 1] = key[:, :, 0]
            layer.sequence_values[: len(step.sequences_B), :, step.sequence_tokens - 1] = value[:, :, 0]
        else:
            layer.sequence_keys[step.sequences_B, :, step.written_B] = key[:, :, 0]
            layer.sequence_values[step.sequences_B, :, step.written_B] = value[:, :, 0]
        return layer

    def _append_several(self, layer: Layer, new: Extension, key: torch.Tensor, value: torch.Tensor) -> Layer:
        for name, tensor in zip(OF_SEQUENCES, (key, value), strict=True):
            buffer = getattr(layer, name)
            buffer[new.rows_N, :, new.written_N] = tensor[new.sequence_N, :, new.token_N].to(buffer.dtype)
        return layer


def moves_into_gaps(n: int, gone: Collection[int]) -> list[tuple[int, int]]:
    """(source, target) pairs: when ``gone`` leave n entries, the last ones fill their places. Order is not kept."""
    leaving, left = set(gone), n - len(gone)
    sources = [i for i in range(left, n) if i not in leaving]
    return list(zip(sources, sorted(i for i in leaving if i < left), strict=True))


def remove_entries(entries: list, gone: Collection[int]) -> None:
    """Remove the entries at the places ``gone`` from a list; the last ones fill their places."""
    for source, target in moves_into_gaps(len(entries), gone):
        entries[target] = entries[source]
    del entries[len(entries) - len(gone) :]
