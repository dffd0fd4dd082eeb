"""Decoding steps on a GPU as replays of CUDA graphs.

Through transformers a step launches hundreds of kernels one by one, and launching takes longer than computing. A graph
launches them all at once, with the shapes and addresses of its capture. So four numbers are rounded up to powers of
two: sequences, their tokens, prompts, and sequences of a prompt. What this adds is computed and never read. A size is
captured when it comes up for the second time. Graphs share one pool of memory and last for a rollout.

No graph has been captured on a GPU yet: the tests record and replay torch's calls on a CPU. At start the backend
compares a replay's logits with the model's own (``check.py``), and does without graphs where they differ.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from grpo.backends.hf.kv_cache import DecodeCache, Shape
from grpo.backends.hf.step import PromptGroups, Step, mask_after
from grpo.model.logprob_lm import LogprobLM

log = logging.getLogger("grpo")

FEWEST_TOKENS = 64  # of a sequence; no graph is for fewer

# Records a function's work. Returns a function that repeats it, from the same tensors into the same tensors.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_capture() -> Capture:
    """Captures into graphs that share one pool of memory, which is safe because they are replayed one at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(compute: Callable[[], None]) -> Callable[[], None]:
        graph, stream, caching = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.is_autocast_cache_enabled()
        # A cast that was kept before may be freed before a replay. One that is made now is overwritten by a replay.
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                compute()
        except RuntimeError as error:  # "nothing to end"; the cause is its context
            raise error.__context__ or error from None
        finally:
            torch.cuda.set_stream(stream)  # after a failure torch leaves another
            torch.set_autocast_cache_enabled(caching)
        return graph.replay

    return capture


@dataclass(frozen=True)
class Size:
    """What a graph is for. ``prompts`` is 0 where sequences hold a copy of their prompt."""

    sequences: int
    sequence_tokens: int
    prompts: int
    group_size: int

    @classmethod
    def of(cls, cache: DecodeCache) -> Size:
        shape = cache.shape
        sequences = cls.up(len(cache.lengths), shape.sequences)
        sequence_tokens = cls.up(max(cache.longest + 1, FEWEST_TOKENS), shape.sequence_tokens)
        if shape.head_tokens:
            return cls(sequences, sequence_tokens, 0, 0)
        largest_group = max(Counter(cache.prompt_of).values())
        prompts = cls.up(len(cache.prompt_lengths), shape.prompts)
        return cls(sequences, sequence_tokens, prompts, cls.up(largest_group, shape.sequences))

    @staticmethod
    def up(n: int, most: int) -> int:
        """``n`` rounded up to a power of two, and no more than ``most``."""
        return min(1 << (n - 1).bit_length(), most)


class GraphStep:
    """``NextLogits`` for the engine. The next call overwrites the logits that it returned."""

    def __init__(self, model: LogprobLM, capture: Capture):
        self.model, self.capture = model, capture
        self.cache: DecodeCache | None = None
        self.shape: Shape | None = None
        self.replays: dict[Size, Callable[[], None]] = {}
        self.seen: set[Size] = set()
        self.told: Any = None  # what the inputs hold
        self.logits: torch.Tensor | None = None
        self.inputs: dict[str, torch.Tensor] = {}

    def __call__(self, tokens_B: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        if cache is not self.cache or cache.shape is not self.shape:
            self._begin(cache)
        size = Size.of(cache)
        if self.told != self._state(size):
            self._tell(size)
        cache.clear_to(size.sequence_tokens)
        cache.grow()
        self.told = self._state(size)  # a graph adds 1 to ``written`` itself
        self.inputs["tokens"][: len(tokens_B)].copy_(tokens_B)
        if size not in self.replays and size in self.seen:
            self.replays[size] = self._captured(size)
        self.replays.get(size, partial(self._compute, size))()
        self.seen.add(size)
        assert self.logits is not None
        return self.logits[: len(tokens_B)]

    def _captured(self, size: Size) -> Callable[[], None]:
        compute = partial(self._compute, size)
        try:
            return self.capture(compute)
        except torch.OutOfMemoryError:
            log.warning("decoding: no memory to capture a CUDA graph of %s; computed without, slower", size)
            return compute

    def _begin(self, cache: DecodeCache) -> None:
        """Start over: graphs of other buffers are void."""
        self.cache, self.shape = cache, cache.shape
        self.replays, self.seen, self.told, self.logits = {}, set(), None, None
        sequences, prompts = cache.shape.sequences, cache.shape.prompts
        sizes = {"tokens": sequences, "written": sequences, "prompt_of": sequences, "place": sequences}
        sizes |= {"prompt_lengths": prompts, "sequence_at": prompts * sequences}
        self.inputs = {n: torch.zeros(size, dtype=torch.int64, device=cache.device) for n, size in sizes.items()}
        self.inputs["sequences"] = torch.arange(sequences, device=cache.device)

    def _state(self, size: Size) -> Any:
        assert self.cache is not None
        return size, list(self.cache.lengths), list(self.cache.prompt_of), list(self.cache.prompt_lengths)

    def _tell(self, size: Size) -> None:
        """Write into the inputs which sequences run. Places beyond them are empty sequences of prompt 0."""
        cache = self.cache
        assert cache is not None
        given = {"written": cache.lengths}
        if size.prompts:
            places, sequence_at = PromptGroups.arrange(cache.prompt_of, size.prompts, size.group_size)
            given |= {"prompt_of": cache.prompt_of, "place": places, "sequence_at": sequence_at}
            given |= {"prompt_lengths": cache.prompt_lengths}
        for name, values in given.items():
            self.inputs[name].zero_()[: len(values)].copy_(torch.tensor(values))

    def _compute(self, size: Size) -> None:
        """From the inputs into ``self.logits``: logits of one more token of every sequence. A graph captures this."""
        cache, inputs = self.cache, self.inputs
        assert cache is not None
        tokens_S, written_S, prompt_S, place_S, sequences_S = (
            inputs[name][: size.sequences] for name in ("tokens", "written", "prompt_of", "place", "sequences")
        )
        positions_S, prompts = written_S, None
        if U := size.prompts:
            lengths_U = inputs["prompt_lengths"][:U]
            prompts = PromptGroups(
                prompt_B=prompt_S,
                lengths_B=lengths_U[prompt_S],
                place_B=place_S,
                sequence_at=inputs["sequence_at"][: U * size.group_size],
                number=U,
                group_size=size.group_size,
                longest=cache.shape.prompt_tokens,
                # Attention over nothing is nan: an unused prompt has one token.
                mask_UP=mask_after(lengths_U.clamp(min=1), cache.shape.prompt_tokens),
            )
            positions_S = prompts.lengths_B + written_S
        mask_SC = mask_after(written_S + 1, size.sequence_tokens)
        cache.step = Step(sequences_S, written_S, positions_S, size.sequence_tokens, mask_SC, prompts)
        hidden_S1H = self.model.causal_lm.base_model(
            input_ids=tokens_S[:, None], position_ids=positions_S[:, None], use_cache=False
        ).last_hidden_state
        logits_SV = self.model.head(hidden_S1H[:, 0])
        if self.logits is None:
            self.logits = logits_SV.new_empty(cache.shape.sequences, logits_SV.shape[1])
        self.logits[: size.sequences].copy_(logits_SV)
        written_S += 1
