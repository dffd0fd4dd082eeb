"""Continuous batching: completions wait in a queue, and as many as memory holds are decoded together.

The completions of a prompt share its keys and values, which are computed once. A completion that ends frees its place
at once, and the next in the queue takes it. Where the cache does not hold every sequence at full length, sequences
start with less room. When one outgrows its room, the youngest are preempted: they go back to the queue, and are
computed again up to where they were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from grpo.backends.base import Request, Sampling
from grpo.backends.hf.attention import decoding_into
from grpo.backends.hf.budget import Budget
from grpo.backends.hf.draw import Distribution
from grpo.backends.hf.kv_cache import DecodeCache, Prefill, Shape, remove_entries
from grpo.errors import RunError
from grpo.model.logprob_lm import LogprobLM
from grpo.randomness import uniforms

PREFILL_TOKENS = 16384  # padded tokens in one forward pass over prompts
# Tokens drawn between two looks at them. Looking makes the host wait for an accelerator.
BURST = {"cpu": 1}
BURST_ELSEWHERE = 16

# Given one more token (B,) of every running sequence, and the cache: the logits (B,V) behind it. The next call may
# overwrite them.
NextLogits = Callable[[torch.Tensor, DecodeCache], torch.Tensor]
# Given besides a uniform number (B,) for each: the next tokens (B,) and their log-probabilities (B,).
NextTokens = Callable[[torch.Tensor, torch.Tensor, DecodeCache], tuple[torch.Tensor, torch.Tensor]]


def drawing(step: NextLogits, distribution: Distribution) -> NextTokens:
    """``NextTokens`` that draws behind ``step``."""
    return lambda tokens_B, uniforms_B, cache: distribution.draw(step(tokens_B, cache), uniforms_B)


def step_through_transformers(model: LogprobLM, tokens_B: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
    """``NextLogits`` by the model's own modules. Call it within ``decoding_into``."""
    step = cache.begin_step()
    hidden_B1H = model.body(
        input_ids=tokens_B[:, None],
        position_ids=step.positions_B[:, None],
        attention_mask=model.no_mask(tokens_B.device),
        use_cache=False,
    ).last_hidden_state
    return model.head(hidden_B1H[:, 0])


@dataclass(eq=False)
class SampledSequence:
    """A completion that is being sampled: which one of which request, the key of its draws, and its tokens so far."""

    request: int
    sample: int
    key: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    def add(self, token: int, logprob: float) -> None:
        """Raises RunError where the token was drawn from nan."""
        if logprob != logprob:
            raise RunError("the model's logits are nan: its weights or the compute type's range are at fault")
        self.tokens.append(token)
        self.logprobs.append(logprob)


class Engine:
    """Samples the completions of one rollout. ``run()`` yields each as it ends.

    ``ended(key, tokens)`` says whether a completion is over. ``budget`` bounds the sequences and their keys and values;
    ``cache`` is empty and holds the budget's first shape.
    """

    def __init__(
        self,
        model: LogprobLM,
        requests: list[Request],
        sampling: Sampling,
        ended: Callable[[int, list[int]], bool],
        *,
        budget: Budget,
        cache: DecodeCache,
        next_tokens: NextTokens,
    ):
        self.model, self.requests, self.sampling, self.ended = model, requests, sampling, ended
        self.budget, self.cache, self.next_tokens, self.device = budget, cache, next_tokens, cache.device
        self.distribution = Distribution.of(sampling)
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids))
        self.waiting = deque(SampledSequence(i, g, key) for i in by_length for g, key in enumerate(requests[i].keys))
        self.running: list[SampledSequence] = []  # by their place in the cache
        self.prompts: list[int] = []  # requests whose prompts the cache holds, by slot
        self.first_logits: dict[int, torch.Tensor] = {}  # (V,) behind the prompt of a request with sequences to start
        self.preemptions = 0

    def run(self) -> Iterator[SampledSequence]:
        with decoding_into(self.model.causal_lm, self.cache):
            while self.waiting or self.running:
                if self.waiting:
                    yield from self._finish(self._schedule())
                if self.running:
                    yield from self._finish(self._decode())

    def _schedule(self) -> list[int]:
        """Fill free places from the queue and draw first tokens. Returns the places of sequences that end with theirs.

        Preempted sequences get their keys and values back.
        """
        head = self.cache.shape.head_tokens
        longest = max([self.cache.longest, *(head + len(sequence.tokens) for sequence in self.waiting)])
        if 4 * longest < self.cache.shape.sequence_tokens:
            self._resize(self.budget.shorter(self.cache.shape))
        fresh: list[SampledSequence] = []
        prefill: list[tuple[int, SampledSequence | None]] = []  # a request's prompt, or all of a preempted sequence
        while self.waiting and len(self.running) < self.cache.shape.sequences:
            sequence = self.waiting[0]
            if sequence.request not in self.prompts:
                if len(self.prompts) == self.cache.shape.prompts:
                    break
                self.prompts.append(sequence.request)
                self.cache.add_prompt(len(self.requests[sequence.request].prompt.token_ids))
                self.first_logits.pop(sequence.request, None)
                prefill.append((sequence.request, None))
            self.running.append(self.waiting.popleft())
            self.cache.add_sequence(self.prompts.index(sequence.request), max(len(sequence.tokens) - 1, 0))
            if sequence.tokens:
                prefill.append((sequence.request, sequence))
            else:
                fresh.append(sequence)
        self._prefill(prefill)
        return self._start(fresh) if fresh else []

    def _start(self, fresh: list[SampledSequence]) -> list[int]:
        """Draw the first tokens of sequences. Returns the places of those that end with theirs."""
        logits_BV = torch.stack([self.first_logits[sequence.request] for sequence in fresh])
        to_start = {sequence.request for sequence in self.waiting if not sequence.tokens}
        self.first_logits = {r: logits_V for r, logits_V in self.first_logits.items() if r in to_start}
        drawn_B, logps_B = self.distribution.draw(logits_BV, self._uniforms(fresh, 1)[:, 0])
        place_of = {id(sequence): place for place, sequence in enumerate(self.running)}
        places = [place_of[id(sequence)] for sequence in fresh]
        self.cache.begin_sequences(places)
        return self._extend(places, drawn_B[:, None], logps_B[:, None])

    def _prefill(self, wanted: list[tuple[int, SampledSequence | None]]) -> None:
        """Compute and file away keys and values of prompts, and of preempted sequences."""

        def ids(request: int, sequence: SampledSequence | None) -> list[int]:
            return self.requests[request].prompt.token_ids + (sequence.tokens[:-1] if sequence else [])

        for batch in _batches(wanted, lambda pair: len(ids(*pair))):
            tokens = [ids(*pair) for pair in batch]
            width = max(map(len, tokens))
            ids_UT = torch.tensor([t + [0] * (width - len(t)) for t in tokens], device=self.device)
            self.cache.begin_prefill(self._destinations(batch))
            hidden_UTH = self.model.body(input_ids=ids_UT, use_cache=False).last_hidden_state
            self.cache.prefill = None
            prompts = [(row, request) for row, (request, sequence) in enumerate(batch) if sequence is None]
            rows = [row for row, _ in prompts]
            logits_UV = self.model.head(hidden_UTH[rows, [len(tokens[row]) - 1 for row in rows]])
            self.first_logits |= {request: logits_UV[u] for u, (_, request) in enumerate(prompts)}

    def _destinations(self, batch: list[tuple[int, SampledSequence | None]]) -> Prefill:
        prefill = Prefill()
        for row, (request, sequence) in enumerate(batch):
            length = len(self.requests[request].prompt.token_ids)
            if sequence is None:
                prefill.prompts.append((row, self.prompts.index(request), length))
            else:
                prefill.tails.append((row, self.running.index(sequence), length, len(sequence.tokens) - 1))
        return prefill

    def _decode(self) -> list[int]:
        """Draw a burst of tokens for every running sequence. Returns the places of those that end."""
        if self.cache.longest == self.cache.shape.sequence_tokens:
            self._make_longer()
        burst = BURST.get(self.device.type, BURST_ELSEWHERE)
        burst = min(burst, self.cache.shape.sequence_tokens - self.cache.longest)
        uniforms_BK = self._uniforms(self.running, burst)
        tokens_B = torch.tensor([sequence.tokens[-1] for sequence in self.running], device=self.device)
        drawn, logps = [], []
        for k in range(burst):
            tokens_B, logps_B = self.next_tokens(tokens_B, uniforms_BK[:, k], self.cache)
            drawn.append(tokens_B)
            logps.append(logps_B)
        return self._extend(range(len(self.running)), torch.stack(drawn, 1), torch.stack(logps, 1))

    def _uniforms(self, sequences: list[SampledSequence], count: int) -> torch.Tensor:
        """The next ``count`` uniform numbers (B,count) of each, which its key and its tokens' positions determine."""
        positions_BK = np.array([len(sequence.tokens) for sequence in sequences])[:, None] + np.arange(count)[None]
        return torch.from_numpy(uniforms([sequence.key for sequence in sequences], positions_BK)).to(self.device)

    def _extend(self, places: Iterable[int], drawn_BK: torch.Tensor, logps_BK: torch.Tensor) -> list[int]:
        """Add the drawn tokens, up to a sequence's end. Returns the places of sequences that end."""
        over = []
        for place, tokens, logps in zip(places, drawn_BK.tolist(), logps_BK.tolist(), strict=True):
            sequence = self.running[place]
            for token, logp in zip(tokens, logps, strict=True):
                sequence.add(token, logp)
                sequence.stopped = self.ended(sequence.key, sequence.tokens)
                if sequence.stopped or len(sequence.tokens) == self.sampling.max_completion_length:
                    over.append(place)
                    break
        return over

    def _finish(self, places: list[int]) -> list[SampledSequence]:
        """Free the places of sequences that ended. The prompt of the next in the queue stays."""
        return self._remove(places, {sequence.request for sequence in list(self.waiting)[:1]}) if places else []

    def _preempt(self, places: list[int]) -> None:
        """Put running sequences back at the queue's head, in the reverse order of ``places``."""
        back = self._remove(places, set())
        self.waiting.extendleft(back)
        self.preemptions += len(back)

    def _remove(self, places: list[int], kept_requests: set[int]) -> list[SampledSequence]:
        """Take sequences out of the cache, then prompts that no running sequence and none of ``kept_requests`` has."""
        removed = [self.running[place] for place in places]
        self.cache.remove_sequences(places)
        remove_entries(self.running, places)
        needed = kept_requests | {sequence.request for sequence in self.running}
        unused = [slot for slot, request in enumerate(self.prompts) if request not in needed]
        self.cache.remove_prompts(unused)
        remove_entries(self.prompts, unused)
        return removed

    def _make_longer(self) -> None:
        """More room for each sequence. Where fewer then fit, preempt the youngest."""
        shape = self.budget.longer(self.cache.shape)
        surplus = len(self.running) - shape.sequences
        if surplus > 0:
            youngest = sorted(range(len(self.running)), key=lambda place: (len(self.running[place].tokens), -place))
            self._preempt(youngest[:surplus])
        self._resize(shape)

    def _resize(self, shape: Shape) -> None:
        if shape != self.cache.shape:
            self.cache.resize_sequences(shape)


def _batches(sequences: list, length: Callable) -> Iterator[list]:
    """Batches of at most ``PREFILL_TOKENS`` padded tokens, sequences of like length together."""
    batch: list = []
    for sequence in sorted(sequences, key=length):
        if batch and (len(batch) + 1) * length(sequence) > PREFILL_TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
