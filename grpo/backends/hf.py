"""Rollouts with transformers, in the training process, from the trainer's own weights.

``engine.py`` schedules, ``kv_cache.py`` holds keys and values, ``attention.py`` reads them, ``sampling.py`` draws; on a
CPU ``decode_cpu.py`` makes a whole step one compiled call for the models that it knows. What a completion becomes
depends on its key and the weights alone: the uniform numbers never depend on the batch; logits agree to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from grpo.backends.base import OnGroup, Request, Sampling
from grpo.backends.decode_cpu import DecodeStep
from grpo.backends.decode_cpu import why_not as why_not_compiled
from grpo.backends.engine import Decoding, Row
from grpo.backends.engine_check import bytes_per_token
from grpo.backends.linear import packed_linears
from grpo.errors import RunError, UserError
from grpo.memory import total_memory
from grpo.policy import Policy
from grpo.scored_lm import ScoredLM
from grpo.types import Completion, Status, VersionSpan

log = logging.getLogger("grpo")

CACHE_SHARE = 0.25  # of the device's memory: a share of what is free would make a resumed run another one


class HFBackend:
    """Generates with the policy's module itself, or a copy where the compute type differs or weights are sharded.

    ``max_batch_size`` bounds the completions decoded at once, ``kv_cache_gb`` their keys and values (None: a quarter of
    the device's memory, divided among the processes that share it).
    """

    def __init__(self, policy: Policy, *, max_batch_size: int, kv_cache_gb: float | None = None):
        self.tokenizer = policy.tokenizer
        self.stop_token_ids = frozenset(policy.stop_token_ids)
        self.max_batch_size = max_batch_size
        self.device = policy.device
        self.version = -1
        self.shares_weights = not policy.sharded and (policy.compute_dtype == torch.float32 or policy.is_lora)
        model = policy.causal_lm if self.shares_weights else policy.empty_copy(policy.compute_dtype)
        self.autocast_dtype = policy.compute_dtype if policy.is_lora else None
        if getattr(model, "_is_stateful", False) or not model._can_set_attn_implementation():
            raise UserError(
                f"model.name: {type(model).__name__} does not attend through transformers' attention interface (or "
                "keeps a recurrent state), which the hf backend needs; use rollout.backend: vllm or another model"
            )
        self.model = model
        self.scored = ScoredLM(model)
        with self._sampling_mode():
            why = why_not_compiled(model)
            self.compiled = why is None
            size = bytes_per_token(self.scored, self.device, DecodeStep(model) if self.compiled else None)
        if self.device.type == "cpu" and policy.accelerator.is_main_process:
            what = "decoding: one compiled call a step" if self.compiled else "decoding: through transformers, slower"
            log.info("%s%s", what, "" if why is None else f": {why}")
        sharing = policy.accelerator.num_processes if self.device.type == "cpu" else 1
        budget = kv_cache_gb * 1e9 if kv_cache_gb else CACHE_SHARE * total_memory(self.device) / sharing
        self.cache_tokens = int(budget / size)

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        if not self.shares_weights:
            self.model.load_state_dict(policy.full_state())
        self.version = version
        return {}

    def close(self) -> None:
        self.model = self.scored = None

    def generate(
        self, requests: list[Request], sampling: Sampling, version: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        if version != self.version:
            raise RunError(f"rollout asked for policy version {version}, the hf backend holds version {self.version}")
        groups: list[list[Completion | None]] = [[None] * len(request.keys) for request in requests]
        missing = [len(request.keys) for request in requests]
        with self._sampling_mode(), nullcontext() if self.compiled else packed_linears(self.model):
            for row in self._rows(requests, sampling):
                groups[row.request][row.sample] = self._completion(row)
                missing[row.request] -= 1
                if on_group is not None and missing[row.request] == 0:
                    on_group(row.request, groups[row.request])
        return groups

    def _rows(self, requests: list[Request], sampling: Sampling) -> Iterator[Row]:
        if not requests:
            return iter(())
        return Decoding(
            self.scored,
            requests,
            sampling,
            lambda key, tokens: self._ended(key, tokens, sampling.stop),
            max_rows=self.max_batch_size,
            cache_tokens=self.cache_tokens,
            device=self.device,
            compiled_step=DecodeStep(self.model) if self.compiled else None,
        ).rows()

    @contextmanager
    def _sampling_mode(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        autocast = torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()
        try:
            with torch.no_grad(), autocast:
                yield
        finally:
            self.model.train(was_training)

    def _ended(self, key: int, token_ids: list[int], stop: list[str]) -> bool:
        """Whether a completion is over with its last token; ``key`` is that of its draws."""
        if token_ids[-1] in self.stop_token_ids:
            return True
        if not stop:
            return False
        window = max(len(s) for s in stop) + 4  # a token holds at least one character, bytes of one glyph apart
        tail = self.tokenizer.decode(token_ids[-window:])
        return any(s in tail for s in stop)

    def _completion(self, row: Row) -> Completion:
        return Completion(
            token_ids=row.tokens,
            sampler_logprobs=row.logprobs,
            status=Status.STOP if row.stopped else Status.LENGTH,
            text=self.tokenizer.decode(row.tokens, skip_special_tokens=True),
            versions=[VersionSpan(0, len(row.tokens), self.version)],
        )
