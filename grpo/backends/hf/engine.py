"""Continuous batching: a queue of completions, the rows being decoded, and the memory they may take.

Rows of a prompt share its keys and values, which are computed once. A row that ends gives up its place at once and the
queue fills it. Where the cache's budget does not hold every row at its full length, rows start short; when one outgrows
that, the youngest are sent back to the queue, to be computed again up to where they were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from grpo.backends.base import Request, Sampling
from grpo.backends.hf.attention import decoding_into
from grpo.backends.hf.draw import sample
from grpo.backends.hf.kv_cache import DecodeCache, Prefill, Shape, head_tokens
from grpo.errors import RunError, UserError
from grpo.model.scored_lm import ScoredLM
from grpo.randomness import uniforms

PREFILL_TOKENS = 16384  # padded tokens in one forward pass over prompts
SHORTEST_ROW = 64  # tokens; rows do not start shorter than this where memory is short
# Tokens drawn between two looks at what was drawn: looking makes the host wait for an accelerator.
BURST = {"cpu": 1}
BURST_ELSEWHERE = 16

# Tokens (B,), one more of every live row, and the cache to logits (B,V) behind them, which the next step may overwrite.
NextLogits = Callable[[torch.Tensor, DecodeCache], torch.Tensor]


def step_through_transformers(model: ScoredLM, tokens_B: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
    """``NextLogits`` by the model's own modules, which attend into the cache within ``decoding_into``."""
    step = cache.begin_step()
    hidden_B1H = model.causal_lm.base_model(
        input_ids=tokens_B[:, None], position_ids=step.positions_B[:, None], use_cache=False
    ).last_hidden_state
    return model.head(hidden_B1H[:, 0])


@dataclass(eq=False)
class Row:
    """A completion on its way: whose it is, the key of its draws, and what was drawn so far."""

    request: int
    sample: int
    key: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


class Decoding:
    """One rollout. ``rows()`` yields completions as they end; ``ended(key, tokens)`` says whether one has.

    Raises:
        UserError: the budget (``cache_tokens``, of prompts and rows together) does not hold one prompt and one row.
    """

    def __init__(
        self,
        model: ScoredLM,
        requests: list[Request],
        sampling: Sampling,
        ended: Callable[[int, list[int]], bool],
        *,
        max_rows: int,
        cache_tokens: int,
        device: torch.device,
        step: NextLogits,
    ):
        self.model, self.requests, self.sampling, self.ended, self.device = model, requests, sampling, ended, device
        self.step = step
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids))
        self.waiting = deque(Row(i, g, key) for i in by_length for g, key in enumerate(requests[i].keys))
        self.budget = Budget.of(requests, sampling.max_completion_length, max_rows, cache_tokens)
        self.cache = DecodeCache(self.budget.first_shape(), device)
        self.live: list[Row] = []
        self.prompts: list[int] = []  # live prompts' requests, by their slot in the cache
        self.first_logits: dict[int, torch.Tensor] = {}  # (V,) behind a prompt that has rows to start
        self.preemptions = 0

    def rows(self) -> Iterator[Row]:
        with decoding_into(self.model.causal_lm, self.cache):
            while self.waiting or self.live:
                if self.waiting:
                    yield from self._retire(self._admit())
                if self.live:
                    yield from self._retire(self._decode())

    def _admit(self) -> list[int]:
        """Fill free places from the queue and draw first tokens; the places of rows that end with theirs."""
        head = self.cache.shape.head_tokens
        longest = max([self.cache.longest, *(head + len(row.tokens) for row in self.waiting)])
        if 4 * longest < self.cache.shape.row_tokens:
            self._resize(self.budget.shorter(self.cache.shape))
        fresh: list[Row] = []
        prefill: list[tuple[int, Row | None]] = []  # a request's prompt, or all of a row that was sent back
        while self.waiting and len(self.live) < self.cache.shape.rows:
            row = self.waiting[0]
            if row.request not in self.prompts:
                if len(self.prompts) == self.cache.shape.prompts:
                    break
                self.prompts.append(row.request)
                self.cache.add_prompt(len(self.requests[row.request].prompt.token_ids))
                self.first_logits.pop(row.request, None)
                prefill.append((row.request, None))
            self.live.append(self.waiting.popleft())
            self.cache.add_row(self.prompts.index(row.request), max(len(row.tokens) - 1, 0))
            if row.tokens:
                prefill.append((row.request, row))
            else:
                fresh.append(row)
        self._prefill(prefill)
        if not fresh:
            return []
        logits_BV = torch.stack([self.first_logits[row.request] for row in fresh])
        to_start = {row.request for row in self.waiting if not row.tokens}
        self.first_logits = {r: logits_V for r, logits_V in self.first_logits.items() if r in to_start}
        drawn_B, logps_B = self._draw(logits_BV, self._uniforms(fresh, 1)[:, 0])
        place_of = {id(row): place for place, row in enumerate(self.live)}
        places = [place_of[id(row)] for row in fresh]
        self.cache.begin_rows(places)
        return self._extend(places, drawn_B[:, None], logps_B[:, None])

    def _prefill(self, sequences: list[tuple[int, Row | None]]) -> None:
        """Compute and file away prompts' keys and values, and those of rows that were sent back."""

        def ids(request: int, row: Row | None) -> list[int]:
            return self.requests[request].prompt.token_ids + (row.tokens[:-1] if row else [])

        for batch in _batches(sequences, lambda s: len(ids(*s))):
            tokens = [ids(*sequence) for sequence in batch]
            width = max(map(len, tokens))
            ids_UT = torch.tensor([t + [0] * (width - len(t)) for t in tokens], device=self.device)
            self.cache.begin_prefill(self._destinations(batch))
            hidden_UTH = self.model.causal_lm.base_model(input_ids=ids_UT, use_cache=False).last_hidden_state
            self.cache.prefill = None
            wanted = [(place, request) for place, (request, row) in enumerate(batch) if row is None]
            places = [place for place, _ in wanted]
            logits_UV = self.model.head(hidden_UTH[places, [len(tokens[place]) - 1 for place in places]])
            self.first_logits |= {request: logits_UV[u] for u, (_, request) in enumerate(wanted)}

    def _destinations(self, batch: list[tuple[int, Row | None]]) -> Prefill:
        prefill = Prefill()
        for place, (request, row) in enumerate(batch):
            length = len(self.requests[request].prompt.token_ids)
            if row is None:
                prefill.prompts.append((place, self.prompts.index(request), length))
            else:
                prefill.tails.append((place, self.live.index(row), length, len(row.tokens) - 1))
        return prefill

    def _decode(self) -> list[int]:
        """A burst of tokens for every live row; the places of those that ended."""
        if self.cache.longest == self.cache.shape.row_tokens:
            self._make_longer()
        burst = BURST.get(self.device.type, BURST_ELSEWHERE)
        burst = min(burst, self.cache.shape.row_tokens - self.cache.longest)
        uniforms_BK = self._uniforms(self.live, burst)
        tokens_B = torch.tensor([row.tokens[-1] for row in self.live], device=self.device)
        drawn, logps = [], []
        for k in range(burst):
            tokens_B, logps_B = self._draw(self.step(tokens_B, self.cache), uniforms_BK[:, k])
            drawn.append(tokens_B)
            logps.append(logps_B)
        return self._extend(range(len(self.live)), torch.stack(drawn, 1), torch.stack(logps, 1))

    def _uniforms(self, rows: list[Row], count: int) -> torch.Tensor:
        """The next ``count`` uniform numbers (B,count) of each row: functions of its key and its tokens' positions."""
        positions_BK = np.array([len(row.tokens) for row in rows])[:, None] + np.arange(count)[None]
        return torch.from_numpy(uniforms([row.key for row in rows], positions_BK)).to(self.device)

    def _draw(self, logits_BV: torch.Tensor, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.sampling
        return sample(logits_BV, uniforms_B, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)

    def _extend(self, places: Iterable[int], drawn_BK: torch.Tensor, logps_BK: torch.Tensor) -> list[int]:
        """Add what was drawn, up to a row's end; the places of rows that ended."""
        over = []
        for place, tokens, logps in zip(places, drawn_BK.tolist(), logps_BK.tolist(), strict=True):
            row = self.live[place]
            for token, logp in zip(tokens, logps, strict=True):
                if logp != logp:
                    raise RunError("the model's logits are nan: its weights or the compute type's range are at fault")
                row.tokens.append(token)
                row.logprobs.append(logp)
                row.stopped = self.ended(row.key, row.tokens)
                if row.stopped or len(row.tokens) == self.sampling.max_completion_length:
                    over.append(place)
                    break
        return over

    def _retire(self, places: list[int]) -> list[Row]:
        """Take rows out of the cache, and prompts that have no more to come."""
        if not places:
            return []
        rows = [self.live[place] for place in places]
        self.cache.remove_rows(places)(self.live)
        needed = {row.request for row in self.live} | {row.request for row in list(self.waiting)[:1]}
        over = [slot for slot, request in enumerate(self.prompts) if request not in needed]
        self.cache.remove_prompts(over)(self.prompts)
        return rows

    def _make_longer(self) -> None:
        """Room for longer rows, and for fewer of them: the youngest go back to the queue's head, oldest first."""
        shape = self.budget.longer(self.cache.shape)
        surplus = len(self.live) - shape.rows
        if surplus > 0:
            youngest = sorted(range(len(self.live)), key=lambda place: (len(self.live[place].tokens), -place))
            back = self._retire_to_queue(youngest[:surplus])
            self.preemptions += len(back)
        self._resize(shape)

    def _retire_to_queue(self, places: list[int]) -> list[Row]:
        back = [self.live[place] for place in places]
        self.cache.remove_rows(places)(self.live)
        self.waiting.extendleft(back)
        over = [slot for slot, request in enumerate(self.prompts) if request not in {r.request for r in self.live}]
        self.cache.remove_prompts(over)(self.prompts)
        return back

    def _resize(self, shape: Shape) -> None:
        if shape != self.cache.shape:
            self.cache.resize_rows(shape)


@dataclass(frozen=True)
class Budget:
    """How the cache's tokens are divided between prompts and rows."""

    tokens: int
    prompts: int
    prompt_tokens: int
    rows: int  # the most that are wanted
    row_tokens: int  # of a row at its longest

    @classmethod
    def of(cls, requests: list[Request], longest_completion: int, max_rows: int, tokens: int) -> Budget:
        prompt_tokens = max((len(r.prompt.token_ids) for r in requests), default=0)
        G = max((len(r.keys) for r in requests), default=1)
        rows = min(max_rows, sum(len(r.keys) for r in requests))
        prompts = min(len(requests), 2 * -(-rows // G) + 1)  # rows end in no order: some prompts linger for one row
        row_tokens = head_tokens(prompt_tokens) + longest_completion
        for_prompts = min(max(tokens // 2, tokens - rows * row_tokens), tokens - row_tokens)
        while prompts > 1 and prompts * prompt_tokens > for_prompts:
            prompts -= 1
        if requests and prompts * prompt_tokens + row_tokens > tokens:
            raise UserError(
                f"rollout.kv_cache_gb holds {tokens} tokens, not a prompt of {prompt_tokens} and a completion of "
                f"{longest_completion}; raise it, or lower rollout.max_completion_length"
            )
        return cls(tokens, prompts, prompt_tokens, rows, row_tokens)

    def _shape(self, row_tokens: int) -> Shape:
        fit = (self.tokens - self.prompts * self.prompt_tokens) // row_tokens
        return Shape(self.prompts, self.prompt_tokens, min(self.rows, fit), row_tokens)

    def first_shape(self) -> Shape:
        """All rows at full length where that fits, else shorter ones, so that more of them run at once."""
        shape = self._shape(self.row_tokens)
        while shape.rows < self.rows and shape.row_tokens > SHORTEST_ROW:
            shape = self._shape(-(-shape.row_tokens // 2))
        return shape

    def longer(self, shape: Shape) -> Shape:
        return self._shape(min(2 * shape.row_tokens, self.row_tokens))

    def shorter(self, shape: Shape) -> Shape:
        """Half as long, where that lets more rows run."""
        half = self._shape(max(-(-shape.row_tokens // 2), min(SHORTEST_ROW, self.row_tokens)))
        return half if half.rows > shape.rows else shape


def _batches(sequences: list, length: Callable) -> Iterator[list]:
    """Pieces of at most ``PREFILL_TOKENS`` padded tokens, sequences of like length together."""
    batch: list = []
    for sequence in sorted(sequences, key=length):
        if batch and (len(batch) + 1) * length(sequence) > PREFILL_TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
