"""Rollouts with transformers, in the training process, from the trainer's own weights.

Each distinct prompt is prefilled once and its cache copied to its completions; finished sequences leave the batch. What
a completion becomes depends on its key and the weights alone: the uniform numbers never depend on the batch; logits
agree to rounding.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from transformers.cache_utils import Cache

from grpo.backends.attention import decoding_attention
from grpo.backends.base import Request, Sampling
from grpo.backends.kv_cache import make_cache
from grpo.backends.sampling import sample
from grpo.errors import RunError, UserError
from grpo.policy import Policy
from grpo.randomness import uniforms
from grpo.types import Completion, Status, VersionSpan

COMPACT_BELOW = 0.75  # drop finished sequences from the batch when fewer than this share are still going


class HFBackend:
    """Generates with the policy's module itself, or a copy where the compute type differs or weights are sharded."""

    def __init__(self, policy: Policy, *, max_batch_size: int):
        self.tokenizer = policy.tokenizer
        self.stop_token_ids = torch.tensor(policy.stop_token_ids, device=policy.device)
        self.max_batch_size = max_batch_size
        self.device = policy.device
        self.version = -1
        self.shares_weights = not policy.sharded and (policy.compute_dtype == torch.float32 or policy.is_lora)
        self.model = policy.causal_lm if self.shares_weights else policy.empty_copy(policy.compute_dtype)
        self.autocast_dtype = policy.compute_dtype if policy.is_lora else None
        if getattr(self.model, "_is_stateful", False):
            raise UserError(
                f"model.name: {type(self.model).__name__} keeps a recurrent state instead of a key-value cache, which "
                "the hf backend can't batch; use an attention model"
            )

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        if not self.shares_weights:
            self.model.load_state_dict(policy.full_state())
        self.version = version
        return {}

    def close(self) -> None:
        self.model = None

    def generate(self, requests: list[Request], sampling: Sampling, version: int) -> list[list[Completion]]:
        if version != self.version:
            raise RunError(f"rollout asked for policy version {version}, the hf backend holds version {self.version}")
        pieces = self._pieces(requests)
        completions: list[list[Completion]] = [[] for _ in requests]
        was_training = self.model.training
        self.model.eval()
        autocast = torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()
        try:
            with torch.no_grad(), autocast, decoding_attention(self.model):
                for piece in pieces:
                    for index, completion in self._decode(requests, piece, sampling):
                        completions[index].append(completion)
        finally:
            self.model.train(was_training)
        return completions

    def _pieces(self, requests: list[Request]) -> list[list[tuple[int, int]]]:
        """Batches of (request, key) pairs of at most ``max_batch_size``, prompts of like length together."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids))
        rows = [(i, g) for i in order for g in range(len(requests[i].keys))]
        return [rows[start : start + self.max_batch_size] for start in range(0, len(rows), self.max_batch_size)]

    def _decode(
        self, requests: list[Request], rows: list[tuple[int, int]], sampling: Sampling
    ) -> list[tuple[int, Completion]]:
        """Completions of one batch, in the order of its rows, each with the index of its request."""
        limit = sampling.max_completion_length
        uniforms_BT = torch.from_numpy(uniforms([requests[i].keys[g] for i, g in rows], np.arange(limit)))
        uniforms_BT = uniforms_BT.to(self.device)
        logits_BV, cache, mask_BT = self._prefill(requests, rows)
        padded_BT = mask_BT if bool((mask_BT == 0).any()) else None
        lengths_B = mask_BT.sum(1)

        alive_B = torch.arange(len(rows), device=self.device)  # rows still in the batch, by their place in ``rows``
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        done = np.zeros(len(rows), dtype=bool)
        for t in range(limit):
            tokens_B, logps_B = sample(
                logits_BV,
                uniforms_BT[alive_B, t],
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
            )
            places = alive_B.tolist()
            stopped_B = torch.isin(tokens_B, self.stop_token_ids).tolist()
            for place, token, logp, stopped in zip(places, tokens_B.tolist(), logps_B.tolist(), stopped_B, strict=True):
                if not done[place]:
                    tokens[place].append(token)
                    logprobs[place].append(logp)
                    done[place] = stopped or self._hits_stop_string(tokens[place], sampling.stop)
            going = np.flatnonzero(~done[places])
            if len(going) == 0 or t == limit - 1:
                break
            if len(going) < COMPACT_BELOW * len(places):
                kept_B = torch.from_numpy(going).to(self.device)
                cache.batch_select_indices(kept_B)
                alive_B, tokens_B, lengths_B = alive_B[kept_B], tokens_B[kept_B], lengths_B[kept_B]
                padded_BT = padded_BT[kept_B] if padded_BT is not None else None
            if padded_BT is not None:
                padded_BT = torch.cat([padded_BT, padded_BT.new_ones(len(padded_BT), 1)], dim=1)
            output = self.model(
                input_ids=tokens_B[:, None],
                attention_mask=padded_BT,
                position_ids=lengths_B[:, None] + t,
                past_key_values=cache,
                use_cache=True,
            )
            logits_BV = output.logits[:, -1]
        return [
            (i, self._completion(tokens[place], logprobs[place], bool(done[place])))
            for place, (i, _) in enumerate(rows)
        ]

    def _prefill(
        self, requests: list[Request], rows: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, Cache, torch.Tensor]:
        """Logits (B,V) behind the prompt of every row, its cache, and the left-padded prompts' mask (B,T)."""
        distinct = sorted({i for i, _ in rows})
        prompts = [requests[i].prompt.token_ids for i in distinct]
        width = max(len(p) for p in prompts)
        ids_UT = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask_UT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        cache = make_cache(self.model.config)
        output = self.model(
            input_ids=ids_UT,
            attention_mask=mask_UT if bool((mask_UT == 0).any()) else None,
            position_ids=(mask_UT.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        place_of = {i: u for u, i in enumerate(distinct)}
        row_of_B = torch.tensor([place_of[i] for i, _ in rows], device=self.device)
        cache.batch_select_indices(row_of_B)
        return output.logits[:, -1][row_of_B], cache, mask_UT[row_of_B]

    def _hits_stop_string(self, token_ids: list[int], stop: list[str]) -> bool:
        if not stop:
            return False
        window = max(len(s) for s in stop) + 4  # a token holds at least one character, bytes of one glyph apart
        tail = self.tokenizer.decode(token_ids[-window:])
        return any(s in tail for s in stop)

    def _completion(self, token_ids: list[int], logprobs: list[float], stopped: bool) -> Completion:
        return Completion(
            token_ids=token_ids,
            sampler_logprobs=logprobs,
            status=Status.STOP if stopped else Status.LENGTH,
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            versions=[VersionSpan(0, len(token_ids), self.version)],
        )
