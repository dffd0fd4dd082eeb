"""Sampling from models with recurrent layers, through transformers' own caches.

Such a layer keeps a state for each sequence, which cannot be shared as keys and values can. So a batch is decoded to
its end: its prompts are computed once, padded on the left, and the cache is repeated for their completions. Rows that
have ended are dropped when they are a quarter of the batch. vLLM is many times faster on a GPU.

Padding must not enter a state. transformers masks it, but a layer with a bias lets it in all the same. At start
``check_own_cache`` compares padded and unpadded prompts; where they differ, only prompts of equal length share a batch.
With an environment every turn begins with rows that are computed anew (``OwnCacheEngine``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from grpo.backends.base import Request, Sampling, Turns
from grpo.backends.hf import check
from grpo.backends.hf.draw import Distribution
from grpo.backends.sequence import Conversation, SampledSequence
from grpo.errors import UserError
from grpo.model.logprob_lm import ATTENTION, LogprobLM
from grpo.randomness import uniforms

DROPPED_AT = 0.75  # of a batch's rows still running, the others leave: dropping copies the whole cache
LENGTHS = (40, 2, 17)  # of the prompts that are tried: what enters a state is forgotten behind a long one
MORE_THAN_ROUNDING = 8  # times what unpadded prompts are off
TINY = 1e-5  # share of the logits' range that is rounding anyway


def keeps_state(model: PreTrainedModel) -> bool:
    """Whether some of a model's layers are recurrent, by what transformers says of it."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    return bool(getattr(model, check.STATEFUL, False)) or not ATTENTION.issuperset(kinds)


class Rows:
    """Sequences that are decoded together: transformers' cache of them, and which of its places hold padding."""

    def __init__(self, model: LogprobLM, prompts: list[list[int]], device: torch.device):
        """Compute prompts, padded on the left. ``logits_BV`` are those behind them."""
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=device)
        self.mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        self.padded = any(len(ids) < width for ids in prompts)
        self.model, self.cache = model, DynamicCache(config=model.causal_lm.config)
        self.logits_BV = self._forward(ids_BT, (self.mask_BT.cumsum(1) - 1).clamp(min=0))

    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """The logits (B,V) behind one more token of each."""
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.mask_BT[:, :1])], 1)
        self.logits_BV = self._forward(tokens_B[:, None], self.mask_BT.sum(1, keepdim=True) - 1)
        return self.logits_BV

    def take(self, rows: list[int]) -> None:
        """Go on with these rows; one may be taken several times."""
        rows_B = torch.tensor(rows, device=self.mask_BT.device)
        self.cache.reorder_cache(rows_B)  # type: ignore[arg-type]  # any int64 tensor
        self.mask_BT, self.logits_BV = self.mask_BT[rows_B], self.logits_BV[rows_B]

    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.cache.layers for t in _tensors(vars(layer)))

    def _forward(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTH = self.model.body(
            input_ids=ids_BT,
            attention_mask=self.mask_BT if self.padded else None,
            position_ids=positions_BT,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return self.model.head(hidden_BTH[:, -1])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)


class OwnCache(NamedTuple):
    """What is known of a model's cache: whether prompts may be padded, and the bytes of one sequence, whatever its
    length and for each of its tokens."""

    pads: bool
    state: int
    token: int

    def description(self) -> str:
        apart = "" if self.pads else ", prompts of equal length alone together, because padding enters its state"
        return f"through transformers' own cache, slower, because the model has recurrent layers{apart}"

    def fitting(self, budget: float, tokens: int) -> int:
        """How many sequences of ``tokens`` fit.

        Raises:
            UserError: not even one.
        """
        size = self.state + self.token * tokens
        if size > budget:
            raise UserError(
                f"rollout.kv_cache_gb: {budget / 1e9:.3g} GB do not hold one sequence of {tokens} tokens, which takes "
                f"{size / 1e9:.3g}"
            )
        return int(budget // size)


@torch.no_grad()
def check_own_cache(
    model: LogprobLM,
    device: torch.device,
    beyond: int = 0,
    longest: int = check.NO_LIMIT,
    around: check.Around = nullcontext,
) -> OwnCache:
    """Compare logits out of the cache with the model's own on a few made-up tokens, padded and not. The longest row has
    ``beyond`` tokens at least, which pass the model's windows. None is longer than ``longest``. The cache is filled
    within ``around``.

    Raises:
        UserError: they differ even without padding.
    """
    lengths = check.prompt_lengths(LENGTHS, beyond, longest)
    ids_T = check.made_up_ids(model, device, lengths)[0]
    prompts = [ids_T[: length + check.STEPS].tolist() for length in lengths]
    own = [
        model.causal_lm(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -check.STEPS :].float()
        for ids in prompts
    ]
    size = max(float(logits.max() - logits.min()) for logits in own)

    def off(places: list[int]) -> float:
        """How far the logits of these prompts, computed together, are from their own, at most."""
        rows = Rows(model, [prompts[place][: -check.STEPS] for place in places], device)
        rows.take([row for row in range(len(places)) for _ in range(2)])
        found = 0.0
        for t in range(check.STEPS):
            tokens = [prompts[place][t - check.STEPS] for place in places for _ in range(2)]
            logits_BV = rows.step(torch.tensor(tokens, device=device)).float()
            expected_BV = torch.stack([own[place][t] for place in places for _ in range(2)])
            found = max(found, float((logits_BV - expected_BV).abs().max()))
        return found

    with around(), check.known_failures(model):
        alone, together = max(off([place]) for place in range(len(prompts))), off(list(range(len(prompts))))
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else model.causal_lm.dtype
    if not alone <= check.TOLERANCE.get(dtype, 0.05) * max(size, 1e-3):
        raise UserError(
            f"model.name: {type(model.causal_lm).__name__} decodes to other logits through its cache than its own "
            f"forward pass has (by {alone:.3g}; they range over {size:.3g}); use rollout.backend: vllm"
        )
    pads = together <= max(MORE_THAN_ROUNDING * alone, TINY * size)
    short, long = (Rows(model, [[1] * n], device).nbytes() for n in (16, 32))
    token = (long - short) // 16
    return OwnCache(pads, short - 16 * token, token)


class OwnCacheEngine:
    """Samples the completions of one rollout. ``run()`` yields each as it ends; ``ended`` and ``turns`` as the
    ``Engine``'s.

    With an environment it goes turn by turn: when all sequences have ended their turns, the answers are taken, and
    prompts, turns and answers are computed again for the next. A state cannot be cut back to where a turn ended, and
    most of these layers take one token at a time once they have one.
    """

    def __init__(
        self,
        model: LogprobLM,
        requests: list[Request],
        sampling: Sampling,
        ended: Callable[[int, list[int]], bool],
        *,
        most: int,
        pads: bool,
        device: torch.device,
        turns: Turns | None = None,
    ):
        self.model, self.requests, self.ended = model, requests, ended
        self.turns, self.conversation = turns, Conversation(sampling, turns)
        self.most, self.pads, self.device = most, pads, device
        self.distribution = Distribution.of(sampling)

    def run(self) -> Iterator[SampledSequence]:
        wanted = [
            SampledSequence(r, g, key) for r, request in enumerate(self.requests) for g, key in enumerate(request.keys)
        ]
        while wanted:
            asked = []
            for sequence in (sequence for batch in self._batches(wanted) for sequence in self._decode(batch)):
                if self.turns is None:
                    yield sequence
                    continue
                self.conversation.ask(sequence)
                asked.append(sequence)
            wanted = []
            for sequence in asked:
                if self.conversation.receive(sequence):
                    wanted.append(sequence)
                else:
                    yield sequence

    def _ids(self, sequence: SampledSequence) -> list[int]:
        return self.requests[sequence.request].prompt.token_ids + sequence.tokens

    def _batches(self, wanted: list[SampledSequence]) -> Iterator[list[SampledSequence]]:
        """Sequences of like length together; of equal length, if prompts may not be padded."""
        batch: list[SampledSequence] = []
        length = 0
        for sequence in sorted(wanted, key=lambda s: len(self._ids(s))):
            tokens = len(self._ids(sequence))
            if batch and (len(batch) == self.most or (tokens != length and not self.pads)):
                yield batch
                batch = []
            batch.append(sequence)
            length = tokens
        if batch:
            yield batch

    def _decode(self, batch: list[SampledSequence]) -> Iterator[SampledSequence]:
        """Sequences as they, or their turns, end."""
        history = [(sequence.request, *sequence.tokens) for sequence in batch]
        different = list(dict.fromkeys(history))
        ids = [self._ids(batch[history.index(one)]) for one in different]
        rows = Rows(self.model, ids, self.device)
        rows.take([different.index(one) for one in history])
        running: list[SampledSequence | None] = list(batch)  # by row; None has ended
        tokens_B = self._draw(rows, batch)
        while True:
            for row, sequence in enumerate(running):
                if sequence is not None and self._over(sequence):
                    running[row] = None
                    yield sequence
            left = [row for row, sequence in enumerate(running) if sequence is not None]
            if not left:
                return
            if len(left) <= DROPPED_AT * len(running):
                rows.take(left)
                running, tokens_B = [running[row] for row in left], tokens_B[left]
            rows.step(tokens_B)
            tokens_B = self._draw(rows, running)

    def _draw(self, rows: Rows, running: list[SampledSequence] | list[SampledSequence | None]) -> torch.Tensor:
        """Draw a token (B,) of each row, and add it to those that have not ended."""
        keys = [sequence.key if sequence else 0 for sequence in running]
        places_B1 = np.array([[len(sequence.tokens) if sequence else 0] for sequence in running])
        uniforms_B = torch.from_numpy(uniforms(keys, places_B1)[:, 0]).to(self.device)
        tokens_B, logps_B = self.distribution.draw(rows.logits_BV, uniforms_B)
        for sequence, token, logp in zip(running, tokens_B.tolist(), logps_B.tolist(), strict=True):
            if sequence is not None:
                sequence.add(token, logp)
        return tokens_B

    def _over(self, sequence: SampledSequence) -> bool:
        sequence.stopped = self.ended(sequence.key, sequence.turn())
        return sequence.stopped or not self.conversation.left(sequence)
