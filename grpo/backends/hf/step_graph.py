"""Decoding steps on a GPU as replays of CUDA graphs.

Through transformers a step launches hundreds of kernels one by one, and launching takes longer than computing. A graph
launches them all at once, the draw of the next tokens included, with the shapes and addresses of its capture. So the
number of sequences is rounded up. What this adds is computed and never read. Where attention goes by each row's own
length (``flash.py``), nothing else is rounded; elsewhere the tokens of a sequence, prompts and sequences of a prompt
are too. A size is captured when it comes up for the second time. Graphs share one pool of memory, and last as long as
the cache whose buffers they read: for many rollouts where the backend keeps the cache.

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

from grpo.backends.hf.draw import Distribution
from grpo.backends.hf.flash import Lengths
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
    def of(cls, cache: DecodeCache, *, by_length: bool) -> Size:
        shape = cache.shape
        if by_length:
            prompts = 0 if shape.head_tokens else shape.prompts
            sequences = cls.up(len(cache.lengths), shape.sequences)
            return cls(sequences, shape.sequence_tokens, prompts, shape.group_size if prompts else 0)
        sequences = cls.power(len(cache.lengths), shape.sequences)
        sequence_tokens = cls.power(max(cache.longest + 1, FEWEST_TOKENS), shape.sequence_tokens)
        if shape.head_tokens:
            return cls(sequences, sequence_tokens, 0, 0)
        largest_group = max(Counter(cache.prompt_of).values())
        prompts = cls.power(len(cache.prompt_lengths), shape.prompts)
        return cls(sequences, sequence_tokens, prompts, cls.power(largest_group, shape.group_size))

    @staticmethod
    def power(n: int, most: int) -> int:
        """``n`` rounded up to a power of two, and no more than ``most``."""
        return min(1 << (n - 1).bit_length(), most)

    @staticmethod
    def up(n: int, most: int) -> int:
        """``n`` rounded up to four sizes between a power of two and the next, and no more than ``most``."""
        step = max(1, 1 << max(0, (n - 1).bit_length() - 3))
        return min(-(-n // step) * step, most)


class GraphStep:
    """Makes decoding steps from the buffers of one cache at a time.

    ``by_length`` says whether attention goes by each row's own length (``flash.py``).
    """

    def __init__(self, model: LogprobLM, capture: Capture, *, by_length: bool = False):
        self.model, self.capture, self.by_length = model, capture, by_length
        self.cache: DecodeCache | None = None
        self.shape: Shape | None = None
        self.replays: dict[tuple[Size, Distribution | None], Callable[[], None]] = {}
        self.seen: set[tuple[Size, Distribution | None]] = set()
        self.told: Any = None  # what the inputs hold
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    def __call__(self, tokens_B: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        """``NextLogits``. The next call overwrites the logits that it returned."""
        self._step(tokens_B, None, cache)
        return self.outputs["logits"][: len(tokens_B)]

    def next_tokens(
        self, distribution: Distribution, tokens_B: torch.Tensor, uniforms_B: torch.Tensor, cache: DecodeCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``NextTokens`` for ``distribution``; the graph draws too."""
        if cache is not self.cache or cache.shape is not self.shape:
            self._begin(cache)
        self.inputs["uniforms"][: len(uniforms_B)].copy_(uniforms_B)
        self._step(tokens_B, distribution, cache)
        drawn_B, logps_B = (self.outputs[name][: len(tokens_B)].clone() for name in ("drawn", "logps"))
        return drawn_B, logps_B

    def _step(self, tokens_B: torch.Tensor, distribution: Distribution | None, cache: DecodeCache) -> None:
        if cache is not self.cache or cache.shape is not self.shape:
            self._begin(cache)
        size = Size.of(cache, by_length=self.by_length)
        if self.told != self._state(size):
            self._tell(size)
        cache.clear_to(cache.longest + 1 if self.by_length else size.sequence_tokens)
        cache.grow()
        self.told = self._state(size)  # a graph adds to ``written`` itself
        self.inputs["tokens"][: len(tokens_B)].copy_(tokens_B)
        wanted = size, distribution
        if wanted not in self.replays and wanted in self.seen:
            self.replays[wanted] = self._captured(*wanted)
        self.replays.get(wanted, partial(self._compute, *wanted))()
        self.seen.add(wanted)

    def _captured(self, size: Size, distribution: Distribution | None) -> Callable[[], None]:
        compute = partial(self._compute, size, distribution)
        try:
            return self.capture(compute)
        except torch.OutOfMemoryError:
            log.warning("decoding: no memory to capture a CUDA graph of %s; computed without, slower", size)
            return compute

    def _begin(self, cache: DecodeCache) -> None:
        """Start over: graphs of other buffers are void."""
        self.cache, self.shape = cache, cache.shape
        self.replays, self.seen, self.told, self.outputs = {}, set(), None, {}
        sequences, prompts = cache.shape.sequences, cache.shape.prompts
        sizes = {"tokens": sequences, "written": sequences, "prompt_of": sequences, "place": sequences}
        sizes |= {"adds": sequences}  # 1 where a sequence runs
        sizes |= {"prompt_lengths": prompts, "sequence_at": prompts * sequences}
        self.inputs = {n: torch.zeros(size, dtype=torch.int64, device=cache.device) for n, size in sizes.items()}
        self.inputs["sequences"] = torch.arange(sequences, device=cache.device)
        self.inputs["uniforms"] = torch.zeros(sequences, dtype=torch.float64, device=cache.device)

    def _state(self, size: Size) -> Any:
        assert self.cache is not None
        cache = self.cache
        held = cache.lengths, cache.prompt_of, cache.prompt_lengths, cache.parked_lengths
        return size, *(list(numbers) for numbers in held)

    def _tell(self, size: Size) -> None:
        """Write into the inputs which sequences run. Places beyond them are sequences of prompt 0 that stay as they
        are: what a step writes there stands behind what parked ones hold, and is never read."""
        cache = self.cache
        assert cache is not None
        running, beyond = len(cache.lengths), cache.shape.sequences - len(cache.lengths) - len(cache.parked_lengths)
        written = [*cache.lengths, *[0] * beyond, *reversed(cache.parked_lengths)]
        given = {"written": written, "adds": [1] * running}
        if size.prompts:
            places, sequence_at = PromptGroups.arrange(cache.prompt_of, size.prompts, size.group_size)
            given |= {"prompt_of": cache.prompt_of, "place": places, "sequence_at": sequence_at}
            given |= {"prompt_lengths": cache.prompt_lengths}
        for name, values in given.items():
            self.inputs[name].zero_()[: len(values)].copy_(torch.tensor(values))

    def _compute(self, size: Size, distribution: Distribution | None) -> None:
        """One more token of every sequence, from the inputs into the outputs. A graph captures this."""
        inputs, cache = self.inputs, self.cache
        assert cache is not None
        tokens_S, written_S = inputs["tokens"][: size.sequences], inputs["written"][: size.sequences]
        step = cache.step = self._step_of(size)
        hidden_S1H = self.model.body(
            input_ids=tokens_S[:, None],
            position_ids=step.positions_B[:, None],
            attention_mask=self.model.no_mask(tokens_S.device),
            use_cache=False,
        ).last_hidden_state
        logits_SV = self.model.head(hidden_S1H[:, 0])
        if distribution is None:
            self._put("logits", logits_SV)
        else:
            drawn_S, logps_S = distribution.draw(logits_SV, inputs["uniforms"][: size.sequences])
            self._put("drawn", drawn_S)
            self._put("logps", logps_S)
        written_S += inputs["adds"][: size.sequences]

    def _step_of(self, size: Size) -> Step:
        """What attention needs, as tensors that follow from the inputs."""
        cache, inputs = self.cache, self.inputs
        assert cache is not None
        written_S, prompt_S, place_S, sequences_S = (
            inputs[name][: size.sequences] for name in ("written", "prompt_of", "place", "sequences")
        )
        positions_S, prompts = written_S, None
        if U := size.prompts:
            lengths_U = inputs["prompt_lengths"][:U]
            filled_U = lengths_U.clamp(min=1)  # attention over nothing is nan: an unused prompt has one token
            prompts = PromptGroups(
                prompt_B=prompt_S,
                lengths_B=lengths_U[prompt_S],
                place_B=place_S,
                sequence_at=inputs["sequence_at"][: U * size.group_size],
                number=U,
                group_size=size.group_size,
                longest=cache.shape.prompt_tokens,
                mask_UP=None if self.by_length else mask_after(filled_U, cache.shape.prompt_tokens),
                lengths=Lengths(filled_U) if self.by_length else None,
            )
            positions_S = prompts.lengths_B + written_S
        return Step(
            sequences_S,
            written_S,
            positions_S,
            size.sequence_tokens,
            of_one_length=False,
            mask_BC=None if self.by_length else mask_after(written_S + 1, size.sequence_tokens),
            prompts=prompts,
            lengths=Lengths(written_S + 1) if self.by_length else None,
        )

    def _put(self, name: str, values_S: torch.Tensor) -> None:
        """Into the output of this name, which stays at its address."""
        if name not in self.outputs:
            assert self.shape is not None
            self.outputs[name] = values_S.new_empty(self.shape.sequences, *values_S.shape[1:])
        self.outputs[name][: len(values_S)].copy_(values_S)
