"""Continuous batching: completions wait in a queue, and as many as memory holds are decoded together.

The completions of a prompt share its keys and values, which are computed once. A completion that ends frees its place
at once, and the next in the queue takes it. Where the cache does not hold every sequence at full length, sequences
start with less room. When one outgrows its room, the youngest are preempted: they go back to the queue, and are
computed again up to where they were.

With an environment a completion is an episode of turns. At the end of a turn the environment is asked, and the sequence
is parked: it keeps its keys and values and is not decoded. It comes back after a number of decoding steps, or when
nothing else runs, and never by the clock: who is decoded together decides how numbers are rounded. The engine then
waits for the answer, whose tokens are computed in one forward pass (``extension.py``). Sequences come back together,
because such a pass costs much for a few tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from grpo.backends.base import Request, Sampling, Turns
from grpo.backends.hf.attention import decoding_into
from grpo.backends.hf.budget import Budget
from grpo.backends.hf.buffers import Prefill
from grpo.backends.hf.draw import Distribution
from grpo.backends.hf.extension import MOST_SCORES, extend
from grpo.backends.hf.kv_cache import DecodeCache, Shape, remove_entries
from grpo.backends.sequence import Conversation, SampledSequence
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


class Engine:
    """Samples the completions of one rollout. ``run()`` yields each as it ends.

    ``ended(key, tokens)`` says whether a completion, or a turn of it, is over. ``budget`` bounds the sequences and
    their keys and values; ``cache`` is empty and holds the budget's first shape. ``turns`` is what answers between
    turns.
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
        turns: Turns | None = None,
    ):
        self.model, self.requests, self.ended = model, requests, ended
        self.turns, self.conversation = turns, Conversation(sampling, turns)
        self.budget, self.cache, self.next_tokens, self.device = budget, cache, next_tokens, cache.device
        self.distribution = Distribution.of(sampling)
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids))
        self.waiting = deque(SampledSequence(i, g, key) for i in by_length for g, key in enumerate(requests[i].keys))
        self.running: list[SampledSequence] = []  # by their place in the cache
        self.parked: list[SampledSequence] = []  # the same of those that wait for an answer
        self.over: list[SampledSequence] = []  # episodes that turned out to be over when they were preempted
        self.prompts: list[int] = []  # requests whose prompts the cache holds, by slot
        self.first_logits: dict[int, torch.Tensor] = {}  # (V,) behind the prompt of a request with sequences to start
        self.preemptions = 0
        self.steps = 0  # of decoding

    def run(self) -> Iterator[SampledSequence]:
        with decoding_into(self.model.causal_lm, self.cache):
            while self.waiting or self.running or self.parked:
                if self.waiting:
                    yield from self._finish(self._schedule())
                if due := self._due():
                    yield from self._come_back(due)
                if self.running:
                    yield from self._finish(self._decode())
                while self.over:
                    yield self.over.pop()

    def _schedule(self) -> list[int]:
        """Fill free places from the queue and draw first tokens. Returns the places of sequences that end with theirs.

        Preempted sequences get their keys and values back.
        """
        while any(self._tokens(sequence) > self._room() for sequence in self.waiting):  # it got an answer meanwhile
            self._make_longer()
        if 4 * self._longest() < self._room():
            self._resize(self.budget.shorter(self.cache.shape))
        fresh: list[SampledSequence] = []
        prefill: list[tuple[int, SampledSequence | None]] = []  # a request's prompt, or all of a preempted sequence
        while self.waiting and len(self.running) + len(self.parked) < self.cache.shape.sequences:
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
        if self.cache.longest_held == self._room():
            self._make_longer()
        burst = BURST.get(self.device.type, BURST_ELSEWHERE)
        burst = min(burst, self._room() - self.cache.longest)
        uniforms_BK = self._uniforms(self.running, burst)
        tokens_B = torch.tensor([sequence.tokens[-1] for sequence in self.running], device=self.device)
        drawn, logps = [], []
        for k in range(burst):
            tokens_B, logps_B = self.next_tokens(tokens_B, uniforms_BK[:, k], self.cache)
            drawn.append(tokens_B)
            logps.append(logps_B)
        self.steps += burst
        return self._extend(range(len(self.running)), torch.stack(drawn, 1), torch.stack(logps, 1))

    def _uniforms(self, sequences: list[SampledSequence], count: int) -> torch.Tensor:
        """The next ``count`` uniform numbers (B,count) of each, which its key and its tokens' positions determine."""
        positions_BK = np.array([len(sequence.tokens) for sequence in sequences])[:, None] + np.arange(count)[None]
        return torch.from_numpy(uniforms([sequence.key for sequence in sequences], positions_BK)).to(self.device)

    def _extend(self, places: Iterable[int], drawn_BK: torch.Tensor, logps_BK: torch.Tensor) -> list[int]:
        """Add the drawn tokens, up to the end of a sequence or its turn. Returns the places of those that end."""
        over = []
        for place, tokens, logps in zip(places, drawn_BK.tolist(), logps_BK.tolist(), strict=True):
            sequence = self.running[place]
            for token, logp in zip(tokens, logps, strict=True):
                sequence.add(token, logp)
                sequence.stopped = self.ended(sequence.key, sequence.turn())
                if sequence.stopped or not self.conversation.left(sequence):
                    over.append(place)
                    break
        return over

    def _finish(self, places: list[int]) -> list[SampledSequence]:
        """Free the places of sequences that ended. The prompt of the next in the queue stays. With an environment their
        turns ended: it is asked, and they are parked."""
        if not places:
            return []
        if self.turns is None:
            return self._remove([self.running[place] for place in places], self._next_request())
        asked = [self.running[place] for place in places]
        for sequence in asked:
            self.conversation.ask(sequence, self.steps)
        self.cache.park(places, [len(sequence.tokens) - 1 for sequence in asked])
        self.parked += asked
        remove_entries(self.running, places)
        return []

    def _due(self) -> list[SampledSequence]:
        """Parked sequences whose answers are to be taken now, whether they have come or not.

        Each waits for ``overlap_steps`` decoding steps at least, and for twice as many at most, so that several come
        back together.
        """
        if self.turns is None or not self.running:
            return list(self.parked)
        steps, asked_at = self.turns.overlap_steps, [sequence.asked_at for sequence in self.parked]
        if not asked_at or self.steps - min(asked_at) < 2 * steps:
            return []
        return [sequence for sequence in self.parked if self.steps - sequence.asked_at >= steps]

    def _come_back(self, due: list[SampledSequence]) -> list[SampledSequence]:
        """Parked sequences get their answers and run again, and draw the first token of their next turns. Returns those
        whose episodes are over."""
        over = [sequence for sequence in due if not self.conversation.receive(sequence)]
        finished = self._remove(over, self._next_request()) if over else []
        while any(self._tokens(sequence) > self._room() for sequence in due if sequence in self.parked):
            self._make_longer()  # which may preempt some of them
        back = [sequence for sequence in due if sequence in self.parked]
        if back:
            parked = [self.parked.index(sequence) for sequence in back]
            self.cache.unpark(parked)
            remove_entries(self.parked, parked)
            self.running += back
        return finished + self._finish([place for batch in self._to_extend(back) for place in self._answer(batch)])

    def _to_extend(self, back: list[SampledSequence]) -> Iterator[list[int]]:
        """The places of sequences that came back, the last that run, in batches for one forward pass each."""
        seen = max(self.cache.prompt_lengths, default=0) + self._room()
        places = range(len(self.running) - len(back), len(self.running))
        yield from _batches(places, lambda place: len(self._new(place)), max(1, MOST_SCORES // seen))

    def _new(self, place: int) -> list[int]:
        """The tokens of a running sequence that the cache does not hold."""
        return self.running[place].tokens[self.cache.held(place) :]

    def _answer(self, places: list[int]) -> list[int]:
        """Compute answers and draw the tokens behind them. Returns the places of sequences whose turns end with it."""
        logits_BV = extend(self.model, self.cache, places, [self._new(place) for place in places])
        uniforms_B = self._uniforms([self.running[place] for place in places], 1)[:, 0]
        drawn_B, logps_B = self.distribution.draw(logits_BV, uniforms_B)
        return self._extend(places, drawn_B[:, None], logps_B[:, None])

    def _room(self) -> int:
        """Tokens that the cache has room for in a sequence."""
        return self.cache.shape.sequence_tokens

    def _tokens(self, sequence: SampledSequence) -> int:
        """Tokens of a sequence, with its copy of the prompt."""
        prompt = len(self.requests[sequence.request].prompt.token_ids) if self.cache.shape.head_tokens else 0
        return prompt + len(sequence.tokens)

    def _longest(self) -> int:
        """Tokens of the longest sequence, running, parked or in the queue."""
        head = self.cache.shape.head_tokens
        return max([self.cache.longest_held, *(head + len(sequence.tokens) for sequence in self.waiting)])

    def _next_request(self) -> set[int]:
        return {sequence.request for sequence in list(self.waiting)[:1]}

    def _preempt(self, preempted: list[SampledSequence]) -> None:
        """Put sequences back at the queue's head, in reverse order. Those that wait for an answer wait for it here."""
        self._remove(preempted, set())
        self.preemptions += len(preempted)
        over = [s for s in preempted if s.reply is not None and not self.conversation.receive(s)]
        self.over += over
        self.waiting.extendleft(sequence for sequence in preempted if sequence not in over)

    def _remove(self, removed: list[SampledSequence], kept_requests: set[int]) -> list[SampledSequence]:
        """Take sequences out of the cache, then prompts that no other sequence and none of ``kept_requests`` has."""
        gone = set(removed)
        places = [place for place, sequence in enumerate(self.running) if sequence in gone]
        parked = [place for place, sequence in enumerate(self.parked) if sequence in gone]
        self.cache.remove_sequences(places)
        remove_entries(self.running, places)
        self.cache.remove_parked(parked)
        remove_entries(self.parked, parked)
        needed = kept_requests | {sequence.request for sequence in (*self.running, *self.parked)}
        unused = [slot for slot, request in enumerate(self.prompts) if request not in needed]
        self.cache.remove_prompts(unused)
        remove_entries(self.prompts, unused)
        return removed

    def _make_longer(self) -> None:
        """More room for each sequence. Where fewer then fit, preempt the youngest."""
        shape = self.budget.longer(self.cache.shape)
        held = [*self.running, *self.parked]
        if (surplus := len(held) - shape.sequences) > 0:
            youngest = sorted(range(len(held)), key=lambda place: (len(held[place].tokens), -place))
            self._preempt([held[place] for place in youngest[:surplus]])
        self._resize(shape)

    def _resize(self, shape: Shape) -> None:
        if shape != self.cache.shape:
            self.cache.resize_sequences(shape)


def _batches(sequences: Iterable, length: Callable, most: int = PREFILL_TOKENS) -> Iterator[list]:
    """Batches of at most ``most`` padded tokens, sequences of like length together."""
    batch: list = []
    for sequence in sorted(sequences, key=length):
        if batch and (len(batch) + 1) * length(sequence) > most:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
