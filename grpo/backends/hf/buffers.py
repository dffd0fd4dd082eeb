"""The tensors that keys and values are in, and where a prefill's go. ``kv_cache.py`` says which sequence is where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from grpo.backends.hf.kv_cache import Shape

OF_SEQUENCES, OF_PROMPTS = ("sequence_keys", "sequence_values"), ("prompt_keys", "prompt_values")  # of a layer


@dataclass
class Layer:
    """One attention layer's keys and values: of prompts (U, kv heads, P, D) and of sequences (S, kv heads, C, D)."""

    prompt_keys: torch.Tensor
    prompt_values: torch.Tensor
    sequence_keys: torch.Tensor
    sequence_values: torch.Tensor

    @classmethod
    def empty(cls, shape: Shape, key: torch.Tensor, value: torch.Tensor) -> Layer:
        """Buffers for keys and values of the type and sizes of ``key`` and ``value`` (B, kv heads, T, D)."""

        def like(x: torch.Tensor, n: int, tokens: int) -> torch.Tensor:
            return x.new_empty((n, x.shape[1], tokens, x.shape[3]))

        prompts = (like(x, shape.prompts, shape.prompt_tokens).zero_() for x in (key, value))
        return cls(*prompts, *(like(x, shape.sequences, shape.sequence_tokens) for x in (key, value)))

    def token_bytes(self) -> int:
        """Of one token's keys and values."""
        return sum(b[0, :, 0].numel() * b.element_size() for b in (self.sequence_keys, self.sequence_values))

    def clear_sequences(self, start: int, end: int) -> None:
        """Zeros: masked numbers are multiplied by 0, which makes nan of memory that holds inf or nan."""
        self.sequence_keys[:, :, start:end] = 0
        self.sequence_values[:, :, start:end] = 0

    def resize_sequences(self, shape: Shape, rows: list[int], new_rows: list[int], length: int) -> None:
        """Keeps the first ``length`` tokens of the sequences in ``rows``, in their ``new_rows``."""
        for name in OF_SEQUENCES:
            old = getattr(self, name)
            new = old.new_empty(shape.sequences, old.shape[1], shape.sequence_tokens, old.shape[3])
            new[:, :, :length] = 0
            if rows:
                new[new_rows, :, :length] = old[rows, :, :length]
            setattr(self, name, new)


@dataclass
class Prefill:
    """Where the keys and values of a padded batch go. A preempted sequence stands there with its prompt before it."""

    prompts: list[tuple[int, int, int]] = field(default_factory=list)  # place in the batch, prompt slot, length
    tails: list[tuple[int, int, int, int]] = field(default_factory=list)  # place in the batch, sequence, start, length
    _index: list[torch.Tensor] = field(default_factory=list)

    def prompt_index(self, device: torch.device) -> list[torch.Tensor]:
        """The prompts' places in the batch, and their slots. The first layer makes them, the others use them again."""
        if not self._index:
            places, slots, _ = zip(*self.prompts, strict=True)
            self._index = [torch.tensor(numbers, device=device) for numbers in (places, slots)]
        return self._index
