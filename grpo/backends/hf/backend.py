"""Rollouts with transformers, in the training process, from the trainer's own weights.

``engine.py`` schedules, ``kv_cache.py`` holds keys and values, ``attention.py`` reads them, ``draw.py`` draws. A
step is one compiled call on a CPU (``step_compiled.py``, for the models that it knows), one CUDA graph on a GPU
(``step_graph.py``). What a completion becomes depends on its key and the weights alone: the uniform numbers never
depend on the batch; logits agree to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from transformers import PreTrainedModel

from grpo.backends.base import OnGroup, Request, Sampling
from grpo.backends.hf.check import bytes_per_token
from grpo.backends.hf.engine import Decoding, NextLogits, Row, step_through_transformers
from grpo.backends.hf.few_row_linear import packed_linears
from grpo.backends.hf.step_compiled import DecodeStep
from grpo.backends.hf.step_compiled import why_not as why_not_compiled
from grpo.backends.hf.step_graph import GraphStep, cuda_capture
from grpo.errors import RunError, UserError
from grpo.model.device_memory import total_memory
from grpo.model.policy import Policy
from grpo.model.scored_lm import ScoredLM
from grpo.types import Completion, Status, VersionSpan

log = logging.getLogger("grpo")

CACHE_SHARE = 0.25  # of the device's memory: a share of what is free would make a resumed run another one


def make_compiled_step(model: ScoredLM) -> NextLogits:
    return DecodeStep(model.causal_lm)


def make_graph_step(model: ScoredLM) -> NextLogits:
    return GraphStep(model, cuda_capture())


def make_plain_step(model: ScoredLM) -> NextLogits:
    return partial(step_through_transformers, model)


def _resize(model: PreTrainedModel, *, holds: bool) -> None:
    """Memory for a model's weights, or none; shapes and ties stay."""
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(parameter.nbytes if holds else 0)


def _changes(policy: Policy) -> list[int]:
    """How often each weight was written to, as autograd counts."""
    return [parameter._version for parameter in policy.causal_lm.parameters()]


class HFBackend:
    """Generates with the policy's module itself, or a copy where the compute type differs or weights are sharded. A
    copy of weights that are not sharded is made as a rollout begins and takes no memory between rollouts.

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
            size, how = self._choose_step()
        if policy.accelerator.is_main_process:
            log.info("decoding: %s", how)
        self.policy = None if policy.sharded else policy
        self.copies = not (self.shares_weights or policy.sharded)  # for each rollout
        if self.copies:
            _resize(model, holds=False)
        sharing = policy.accelerator.num_processes if self.device.type == "cpu" else 1
        budget = kv_cache_gb * 1e9 if kv_cache_gb else CACHE_SHARE * total_memory(self.device) / sharing
        self.cache_tokens = int(budget / size)

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        if policy.sharded:
            self.model.load_state_dict(policy.full_state())  # gathered by all processes together
        self.version, self.as_synced = version, _changes(policy)
        return {}

    def close(self) -> None:
        self.model = self.scored = self.policy = None

    def generate(
        self, requests: list[Request], sampling: Sampling, version: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        if version != self.version:
            raise RunError(f"rollout asked for policy version {version}, the hf backend holds version {self.version}")
        if self.policy is not None and _changes(self.policy) != self.as_synced:
            raise RunError(f"the policy changed after its version {version} was synced to the hf backend")
        if not requests:
            return []
        groups: list[list[Completion | None]] = [[None] * len(request.keys) for request in requests]
        missing = [len(request.keys) for request in requests]
        packed = nullcontext() if self.make_step is make_compiled_step else packed_linears(self.model)
        with self._weights(), self._sampling_mode(), packed:
            for row in self._rows(requests, sampling):
                groups[row.request][row.sample] = self._completion(row)
                missing[row.request] -= 1
                if on_group is not None and missing[row.request] == 0:
                    on_group(row.request, groups[row.request])
        return groups

    def _rows(self, requests: list[Request], sampling: Sampling) -> Iterator[Row]:
        return Decoding(
            self.scored,
            requests,
            sampling,
            lambda key, tokens: self._ended(key, tokens, sampling.stop),
            max_rows=self.max_batch_size,
            cache_tokens=self.cache_tokens,
            device=self.device,
            step=self.make_step(self.scored),
        ).rows()

    def _choose_step(self) -> tuple[int, str]:
        """Sets ``make_step``: a way to make a rollout's decoding steps that decodes a few tokens to the model's logits.

        Returns what a token's keys and values take (bytes), and what to say of the choice.
        """
        why = why_not_compiled(self.model)
        ways = [(make_compiled_step, "one compiled call a step")] if why is None else []
        if self.device.type == "cuda":
            ways.append((make_graph_step, "one CUDA graph a step"))
        for make_step, what in ways:
            self.make_step = make_step
            try:
                return bytes_per_token(self.scored, self.device, make_step(self.scored)), what
            except (RuntimeError, RunError) as error:
                log.warning("decoding: %s fails, so it goes through transformers: %s", what, error)
                why = f"{what} fails"
        self.make_step = make_plain_step
        size = bytes_per_token(self.scored, self.device, make_plain_step(self.scored))
        return size, f"through transformers, slower: {why}"

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """Within it, the copy, where there is one, holds the policy's weights."""
        if not self.copies:
            yield
            return
        try:
            _resize(self.model, holds=True)
            self.model.load_state_dict(self.policy.full_state())
            yield
        finally:
            _resize(self.model, holds=False)

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
