"""Decoding steps on a GPU as replays of CUDA graphs.

Through transformers a step launches hundreds of kernels one by one, which takes longer than they do. A graph launches
them all at once, with the shapes and at the addresses it was captured with. So rows, their length, prompts and rows of
a prompt are rounded up to powers of two; what is beyond the live ones is computed and never read. Sizes that come up a
second time are captured; their graphs share one pool of memory and last for a rollout.

The tests replay by a recorder of torch's calls on a CPU: no graph has been captured on a GPU yet. At start the backend
compares a replay's logits with the model's own (``check.py``), and does without where they differ.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from grpo.backends.hf.kv_cache import DecodeCache, LivePrompts, Shape, Step, beyond
from grpo.model.scored_lm import ScoredLM

log = logging.getLogger("grpo")

FEWEST_TOKENS = 64  # of a row; a graph is for no shorter ones

# Records what a function computes; returns what computes it again from the same tensors into the same tensors.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_capture() -> Capture:
    """Captures into graphs that share one pool of memory: they are replayed one after another."""
    pool = torch.cuda.graph_pool_handle()

    def capture(compute: Callable[[], None]) -> Callable[[], None]:
        graph, stream, caching = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.is_autocast_cache_enabled()
        # Casts that are kept from before may be freed before a replay, and those made now are overwritten by one.
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                compute()
        except RuntimeError as error:  # that there was nothing to end, with the cause in its context
            raise error.__context__ or error from None
        finally:
            torch.cuda.set_stream(stream)  # torch leaves another where it fails
            torch.set_autocast_cache_enabled(caching)
        return graph.replay

    return capture


@dataclass(frozen=True)
class Size:
    """What a graph is for. ``prompts`` is 0 where rows hold their own."""

    rows: int
    row_tokens: int
    prompts: int
    group_size: int

    @classmethod
    def of(cls, cache: DecodeCache) -> Size:
        shape = cache.shape
        rows = cls.up(len(cache.row_lengths), shape.rows)
        row_tokens = cls.up(max(cache.longest + 1, FEWEST_TOKENS), shape.row_tokens)
        if shape.head_tokens:
            return cls(rows, row_tokens, 0, 0)
        largest_group = max(Counter(cache.row_prompt).values())
        prompts = cls.up(len(cache.prompt_lengths), shape.prompts)
        return cls(rows, row_tokens, prompts, cls.up(largest_group, shape.rows))

    @staticmethod
    def up(n: int, most: int) -> int:
        """To a power of two, or all there are."""
        return min(1 << (n - 1).bit_length(), most)


class GraphStep:
    """``NextLogits`` for the engine. What it returns is overwritten by the next step: read it before."""

    def __init__(self, model: ScoredLM, capture: Capture):
        self.model, self.capture = model, capture
        self.cache: DecodeCache | None = None
        self.shape: Shape | None = None

    def __call__(self, tokens_B: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        if cache is not self.cache or cache.shape is not self.shape:
            self._begin(cache)
        size = Size.of(cache)
        if self.told != self._state(size):
            self._tell(size)
        cache.clear_to(size.row_tokens)
        cache.grow()
        self.told = self._state(size)  # graphs count what rows have written themselves
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
        """New buffers: graphs of the old ones are void."""
        self.cache, self.shape = cache, cache.shape
        self.replays: dict[Size, Callable[[], None]] = {}
        self.seen: set[Size] = set()
        self.told: Any = None
        self.logits: torch.Tensor | None = None
        rows, prompts = cache.shape.rows, cache.shape.prompts
        sizes = {"tokens": rows, "written": rows, "prompt_of": rows, "place": rows}
        sizes |= {"prompt_lengths": prompts, "row_at": prompts * rows}
        self.inputs = {n: torch.zeros(size, dtype=torch.int64, device=cache.device) for n, size in sizes.items()}
        self.inputs["rows"] = torch.arange(rows, device=cache.device)

    def _state(self, size: Size) -> Any:
        assert self.cache is not None
        return size, list(self.cache.row_lengths), list(self.cache.row_prompt), list(self.cache.prompt_lengths)

    def _tell(self, size: Size) -> None:
        """Who is live, where and how long, into the inputs; rows beyond are like the first of prompt 0, and empty."""
        cache = self.cache
        assert cache is not None
        given = {"written": cache.row_lengths}
        if size.prompts:
            places, row_at = LivePrompts.arrange(cache.row_prompt, size.prompts, size.group_size)
            given |= {"prompt_of": cache.row_prompt, "place": places, "row_at": row_at}
            given |= {"prompt_lengths": cache.prompt_lengths}
        for name, values in given.items():
            self.inputs[name].zero_()[: len(values)].copy_(torch.tensor(values))

    def _compute(self, size: Size) -> None:
        """Logits of one more token of every row, from the inputs into ``self.logits``: what is captured."""
        cache, inputs = self.cache, self.inputs
        assert cache is not None
        tokens_R, written_R, of_R, place_R, rows_R = (
            inputs[name][: size.rows] for name in ("tokens", "written", "prompt_of", "place", "rows")
        )
        positions_R, prompts = written_R, None
        if U := size.prompts:
            lengths_U = inputs["prompt_lengths"][:U]
            prompts = LivePrompts(
                of_B=of_R,
                lengths_B=lengths_U[of_R],
                place_B=place_R,
                row_at=inputs["row_at"][: U * size.group_size],
                number=U,
                group_size=size.group_size,
                longest=cache.shape.prompt_tokens,
                mask_UP=beyond(lengths_U.clamp(min=1), cache.shape.prompt_tokens),  # of nothing at all: not a number
            )
            positions_R = prompts.lengths_B + written_R
        mask_RC = beyond(written_R + 1, size.row_tokens)
        cache.step = Step(rows_R, written_R, positions_R, size.row_tokens, mask_RC, prompts)
        hidden_R1H = self.model.causal_lm.base_model(
            input_ids=tokens_R[:, None], position_ids=positions_R[:, None], use_cache=False
        ).last_hidden_state
        logits_RV = self.model.head(hidden_R1H[:, 0])
        if self.logits is None:
            self.logits = logits_RV.new_empty(cache.shape.rows, logits_RV.shape[1])
        self.logits[: size.rows].copy_(logits_RV)
        written_R += 1
