"""What attention needs to know of one decoding step, in which every running sequence gets one more token, and of an
extension, in which some get several."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from grpo.backends.hf.flash import Lengths


@dataclass(frozen=True)
class Step:
    """One decoding step of B sequences, the same for every layer.

    ``prompts`` is None where sequences hold a copy of their prompt. Masks are added to scores; a mask is None where it
    would mask nothing, or where attention goes by ``lengths``.
    """

    sequences_B: torch.Tensor
    written_B: torch.Tensor  # tokens each sequence held before
    positions_B: torch.Tensor  # the new token's, counted from the prompt's first
    sequence_tokens: int  # to attend over: at least the longest sequence's, the new token included
    of_one_length: bool  # all sequences hold sequence_tokens
    mask_BC: torch.Tensor | None
    prompts: PromptGroups | None
    lengths: Lengths | None = None

    @property
    def rows(self) -> slice:
        """Of the buffers: running sequences are the first."""
        return slice(len(self.sequences_B))

    @property
    def written_BT(self) -> torch.Tensor:
        return self.written_B[:, None]

    @property
    def positions_BT(self) -> torch.Tensor:
        return self.positions_B[:, None]

    @classmethod
    def of(cls, lengths: list[int], prompts: PromptGroups | None, device: torch.device) -> Step:
        """``lengths`` are the tokens that each sequence has written."""
        B, C = len(lengths), max(lengths) + 1
        written_B, of_one_length = torch.tensor(lengths, device=device), min(lengths) + 1 == C
        return cls(
            sequences_B=torch.arange(B, device=device),
            written_B=written_B,
            positions_B=written_B if prompts is None else prompts.lengths_B + written_B,
            sequence_tokens=C,
            of_one_length=of_one_length,
            mask_BC=None if of_one_length else mask_after(written_B + 1, C),
            prompts=prompts,
        )


@dataclass(frozen=True)
class Extension:
    """A pass over several new tokens of B sequences, T at most, the same for every layer. Rows are padded behind.

    ``rows_N``, ``written_N``, ``sequence_N`` and ``token_N`` say of each new token in which row of the buffers its
    sequence is, how many tokens that held before, and where among the B x T it stands.
    """

    rows: torch.Tensor  # of the buffers, in which each sequence is (B,)
    written_BT: torch.Tensor  # tokens each sequence held before; padding has the last token's
    positions_BT: torch.Tensor  # counted from the prompt's first
    sequence_tokens: int  # to attend over: the longest sequence's, the new tokens included
    mask_BTC: torch.Tensor  # added to scores: each new token sees its sequence up to itself
    prompts: PromptGroups | None
    rows_N: torch.Tensor
    written_N: torch.Tensor
    sequence_N: torch.Tensor
    token_N: torch.Tensor

    @classmethod
    def of(
        cls, rows: list[int], held: list[int], new: list[int], prompts: PromptGroups | None, device: torch.device
    ) -> Extension:
        """Sequences in ``rows`` that hold ``held`` tokens get ``new`` more."""
        rows_B, held_B, new_B = (torch.tensor(numbers, device=device) for numbers in (rows, held, new))
        tokens_T = torch.arange(max(new), device=device)
        written_BT = held_B[:, None] + torch.minimum(tokens_T[None], new_B[:, None] - 1)
        C = max(h + n for h, n in zip(held, new, strict=True))
        mask_NC = mask_after(written_BT.flatten() + 1, C)
        sequence_N, token_N = (tokens_T[None] < new_B[:, None]).nonzero(as_tuple=True)
        return cls(
            rows=rows_B,
            written_BT=written_BT,
            positions_BT=written_BT if prompts is None else prompts.lengths_B[:, None] + written_BT,
            sequence_tokens=C,
            mask_BTC=mask_NC.view(*written_BT.shape, C),
            prompts=prompts,
            rows_N=rows_B[sequence_N],
            written_N=written_BT[sequence_N, token_N],
            sequence_N=sequence_N,
            token_N=token_N,
        )


@dataclass(frozen=True)
class PromptGroups:
    """Sequences grouped by prompt, so that a prompt's keys are read once for all sequences of its group.

    There are U groups of ``group_size`` places, and sequence b has place ``place_B[b]``. An empty place holds sequence
    0, whose output there nobody reads.
    """

    prompt_B: torch.Tensor  # the slot of each sequence's prompt
    lengths_B: torch.Tensor  # of each sequence's prompt
    place_B: torch.Tensor
    sequence_at: torch.Tensor  # (U * group_size): the sequence at each place
    number: int  # U
    group_size: int
    longest: int  # prompt, in tokens
    mask_UP: torch.Tensor | None
    lengths: Lengths | None = None
    _by_kv_head: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt_lengths: list[int], prompt_of: list[int], device: torch.device) -> PromptGroups:
        """``prompt_of`` is the slot of each sequence's prompt."""
        U, P = len(prompt_lengths), max(prompt_lengths)
        n = max(Counter(prompt_of).values())
        given = (prompt_lengths, prompt_of, *cls.arrange(prompt_of, U, n))
        lengths_U, prompt_B, place_B, sequence_at = (torch.tensor(values, device=device) for values in given)
        mask_UP = None if min(prompt_lengths) == P else mask_after(lengths_U, P)
        return cls(prompt_B, lengths_U[prompt_B], place_B, sequence_at, U, n, P, mask_UP)

    @staticmethod
    def arrange(prompt_of: list[int], prompts: int, group_size: int) -> tuple[list[int], list[int]]:
        """The place of each sequence, and the sequence at each place."""
        free = [slot * group_size for slot in range(prompts)]
        places, sequence_at = [], [0] * (prompts * group_size)
        for sequence, slot in enumerate(prompt_of):
            places.append(free[slot])
            sequence_at[free[slot]] = sequence
            free[slot] += 1
        return places, sequence_at

    def by_kv_head(self, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices into flat (B, kv heads), one for each of (U, kv heads, group_size); and indices the other way.

        The first layer makes them, the others use them again.
        """
        if kv_heads not in self._by_kv_head:
            U, n, place_B = self.number, self.group_size, self.place_B
            heads = torch.arange(kv_heads, device=place_B.device)
            into = (self.sequence_at.view(U, 1, n) * kv_heads + heads[:, None]).flatten()
            back = (((place_B // n)[:, None] * kv_heads + heads) * n + (place_B % n)[:, None]).flatten()
            self._by_kv_head[kv_heads] = into, back
        return self._by_kv_head[kv_heads]


def mask_after(lengths_N: torch.Tensor, width: int) -> torch.Tensor:
    """(N,width): 0 for the first ``lengths_N`` places of each line, -inf for the others."""
    outside = torch.arange(width, device=lengths_N.device)[None] >= lengths_N[:, None]
    return torch.zeros(outside.shape, device=lengths_N.device).masked_fill_(outside, -torch.inf)
