"""Rollouts with transformers, in the training process, from the trainer's own weights.

``engine.py`` schedules, ``budget.py`` divides the memory, ``kv_cache.py`` holds keys and values, ``attention.py`` reads
them, ``draw.py`` draws tokens, ``stop_strings.py`` ends completions and turns, ``extension.py``
computes what an environment answers. A decoding step is one compiled call on a CPU
(``step_compiled.py``, for the models that it knows) and one CUDA graph on a GPU (``step_graph.py``, ``flash.py``).
Models with recurrent layers are sampled through transformers' own caches (``own_cache.py``).
A completion depends on its key and the weights alone: its uniform numbers never depend on the batch, and logits do so
only by rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from grpo.backends.base import OnGroup, Request, Sampling, Turns
from grpo.backends.hf import flash
from grpo.backends.hf.attention import PLAIN, implementation_of
from grpo.backends.hf.budget import Budget
from grpo.backends.hf.check import Around, cache_bytes, check_attention, check_decoding
from grpo.backends.hf.draw import Distribution
from grpo.backends.hf.engine import Engine, NextLogits, drawing, step_through_transformers
from grpo.backends.hf.few_row_linear import packed_linears
from grpo.backends.hf.kv_cache import DecodeCache, Shape
from grpo.backends.hf.own_cache import OwnCache, OwnCacheEngine, check_own_cache, keeps_state
from grpo.backends.hf.step_compiled import DecodeStep
from grpo.backends.hf.step_compiled import why_not as why_not_compiled
from grpo.backends.hf.step_graph import GraphStep, cuda_capture
from grpo.backends.hf.stop_strings import StopStrings
from grpo.backends.sequence import SampledSequence
from grpo.errors import RunError, UserError
from grpo.model.borders import past_borders
from grpo.model.device_memory import total_memory
from grpo.model.logprob_lm import LogprobLM
from grpo.model.lora import as_if_trained
from grpo.model.memory_budget import CACHE_SHARE, KEPT_SHARE
from grpo.model.policy import Policy
from grpo.prompts.completion_text import CompletionText
from grpo.types import Completion, Status, VersionSpan

log = logging.getLogger("grpo")

PROMPT_STEP = (
    64  # tokens to which room for prompts is rounded up, so that a kept cache serves rollouts of other prompts
)

Way = tuple[Callable[[LogprobLM], NextLogits], str]  # of making steps, and what the log says of it


@dataclass(frozen=True)
class Choice:
    """How a rollout's decoding steps are made."""

    make_step: Callable[[LogprobLM], NextLogits]
    description: str  # for the log


def make_compiled_step(model: LogprobLM) -> NextLogits:
    return DecodeStep(model.causal_lm)


def make_graph_step(model: LogprobLM) -> GraphStep:
    return GraphStep(model, cuda_capture())


def make_graph_step_by_length(model: LogprobLM) -> GraphStep:
    return GraphStep(model, cuda_capture(), by_length=True)


def make_plain_step(model: LogprobLM) -> NextLogits:
    return partial(step_through_transformers, model)


def _resize(model: PreTrainedModel, *, holds: bool) -> None:
    """Give a model's weights memory, or take it away. Shapes and ties stay."""
    for parameter in model.parameters():
        storage, size = parameter.untyped_storage(), parameter.nbytes if holds else 0
        if storage.nbytes() != size:
            storage.resize_(size)


def _changes(policy: Policy) -> list[int]:
    """How often each weight was written to, as autograd counts it."""
    return [parameter._version for parameter in policy.causal_lm.parameters()]


class HFBackend:
    """Generates with the policy's own module, or with a copy where the compute type differs or weights are sharded.

    A copy takes no memory between rollouts, unless weights are sharded or CUDA graphs read it. ``max_batch_size``
    bounds the completions decoded at once. ``kv_cache_gb`` bounds their keys and values; None is a quarter of the
    device's memory, divided among the processes that share it. ``turns``: an environment will answer, so that too is
    tried at start.

    Raises:
        UserError: the model does not attend through transformers' attention interface, or decodes to other logits than
            its own forward pass has.
    """

    def __init__(self, policy: Policy, *, max_batch_size: int, kv_cache_gb: float | None = None, turns: bool = False):
        self.tokenizer = policy.tokenizer
        self.stop_token_ids = frozenset(policy.stop_token_ids)
        self.completion_text = CompletionText(policy.tokenizer, policy.stop_token_ids)
        self.stop_strings: dict[tuple[str, ...], StopStrings] = {}
        self.max_batch_size, self.checks_turns = max_batch_size, turns
        self.device = policy.device
        self.version = -1
        self.kept: tuple[DecodeCache, NextLogits] | None = None  # a cache that rollouts share, and what reads it
        self.shares_weights = not policy.sharded and (policy.compute_dtype == policy.weights_dtype or policy.is_lora)
        model = policy.causal_lm if self.shares_weights else policy.empty_copy(policy.compute_dtype)
        if not self.shares_weights:
            policy.copy_into(model)  # arbitrary numbers would prove nothing, or be nan
        casts = policy.is_lora and policy.compute_dtype != torch.float32
        self.autocast_dtype = policy.compute_dtype if casts else None
        self.own_cache: OwnCache | None = None  # of a model with recurrent layers
        if not keeps_state(model):
            check_attention(model)
        self.model = model
        self.logprob_lm = LogprobLM(model)
        self.rows = past_borders(model.config, policy.longest_sequence), policy.longest_sequence  # to check
        with self._sampling_mode(), as_if_trained(model):
            if keeps_state(model):
                around = self._around(make_plain_step)
                self.own_cache = check_own_cache(self.logprob_lm, self.device, *self.rows, around)
                choice = Choice(make_plain_step, self.own_cache.description())
            else:
                choice = self._choose_step()
                self.token_bytes = cache_bytes(self.logprob_lm, self.device)
        self.make_step = choice.make_step
        if policy.accelerator.is_main_process:
            log.info("decoding: %s", choice.description)
        self.policy = None if policy.sharded else policy
        self.copies = not (self.shares_weights or policy.sharded)  # for each rollout
        if self.copies:
            _resize(model, holds=False)
        sharing = policy.accelerator.num_processes if self.device.type == "cpu" else 1
        self.cache_budget = kv_cache_gb * 1e9 if kv_cache_gb else CACHE_SHARE * total_memory(self.device) / sharing
        if self.own_cache is None:
            self.cache_tokens = int(self.cache_budget / self.token_bytes)

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        if policy.sharded:
            policy.copy_into(self.model)  # gathered by all processes together
        self.version, self.as_synced = version, _changes(policy)
        return {}

    def close(self) -> None:
        """Let go of the weights. Nothing can be generated afterwards."""
        for name in ("model", "logprob_lm", "policy", "kept"):
            vars(self).pop(name, None)

    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        version: int,
        on_group: OnGroup | None = None,
        turns: Turns | None = None,
    ) -> list[list[Completion]]:
        if version != self.version:
            raise RunError(f"rollout asked for policy version {version}, the hf backend holds version {self.version}")
        if self.policy is not None and _changes(self.policy) != self.as_synced:
            raise RunError(f"the policy changed after its version {version} was synced to the hf backend")
        if not requests:
            return []
        done: list[dict[int, Completion]] = [{} for _ in requests]  # by sample

        def group(request: int) -> list[Completion]:
            return [done[request][sample] for sample in range(len(requests[request].keys))]

        with self._weights(), self._sampling_mode(), self._around(self.make_step)():
            for sequence in self._engine(requests, sampling, turns).run():
                request = sequence.request
                done[request][sequence.sample] = self._completion(sequence)
                if on_group is not None and len(done[request]) == len(requests[request].keys):
                    on_group(request, group(request))
        return [group(request) for request in range(len(requests))]

    def _engine(self, requests: list[Request], sampling: Sampling, turns: Turns | None) -> Engine | OwnCacheEngine:
        wanted = tuple(sampling.stop) if turns is None else (*sampling.stop, *turns.stop)
        stop = self.stop_strings.setdefault(wanted, StopStrings(self.tokenizer, list(wanted)))
        longest = sampling.max_completion_length + (turns.max_environment_tokens if turns is not None else 0)

        def ended(key: int, tokens: list[int]) -> bool:
            return self._ended(key, tokens, stop)

        if self.own_cache is not None:
            tokens = max(len(r.prompt.token_ids) for r in requests) + longest
            most = min(self.max_batch_size, self.own_cache.fitting(self.cache_budget, tokens))
            pads, device = self.own_cache.pads, self.device
            return OwnCacheEngine(
                self.logprob_lm, requests, sampling, ended, most=most, pads=pads, device=device, turns=turns
            )
        budget = Budget.of(
            requests,
            longest,
            self.max_batch_size,
            self.cache_tokens,
            prompt_step=1 if self.device.type == "cpu" else PROMPT_STEP,
        )
        cache, step = self._cache_and_step(budget.first_shape())
        distribution = Distribution.of(sampling)
        by_graph = partial(step.next_tokens, distribution) if isinstance(step, GraphStep) else None
        return Engine(
            self.logprob_lm,
            requests,
            sampling,
            ended,
            budget=budget,
            cache=cache,
            next_tokens=by_graph or drawing(step, distribution),
            turns=turns,
        )

    def _cache_and_step(self, shape: Shape) -> tuple[DecodeCache, NextLogits]:
        """An empty cache of at least this shape, and what makes steps from it: those of earlier rollouts, or new ones.

        New ones are kept where CUDA graphs read them and they are small: a graph holds addresses.
        """
        if self.kept is not None and self.kept[0].shape.holds(shape):
            self.kept[0].empty()
            return self.kept
        self.kept = None  # its memory is free before that of another is taken
        step = self.make_step(self.logprob_lm)
        made = DecodeCache(shape, self.device, in_place=isinstance(step, DecodeStep)), step
        weights = sum(p.nbytes for p in self.model.parameters()) if self.copies else 0
        size = weights + shape.tokens() * self.token_bytes
        if isinstance(made[1], GraphStep) and size <= KEPT_SHARE * total_memory(self.device):
            self.kept = made
        return made

    def _choose_step(self) -> Choice:
        """The fastest way to make decoding steps that passes ``check_decoding``.

        Raises:
            UserError: not even steps through transformers pass.
        """
        why = why_not_compiled(self.model)
        ways: list[Way] = [(make_compiled_step, "one compiled call a step")] if why is None else []
        if self.device.type == "cuda":
            ways += self._graph_ways()
        for make_step, what in ways:
            try:
                self._check(make_step)
                return Choice(make_step, what)
            except (RuntimeError, UserError) as error:
                log.warning("decoding: %s fails, so it goes through transformers: %s", what, error)
                why = f"{what} fails"
        self._check(make_plain_step)
        return Choice(make_plain_step, f"through transformers, slower: {why}")

    def _check(self, make_step: Callable[[LogprobLM], NextLogits]) -> None:
        step, around = make_step(self.logprob_lm), self._around(make_step)
        check_decoding(self.logprob_lm, self.device, step, *self.rows, around, turns=self.checks_turns)

    def _around(self, make_step: Callable[[LogprobLM], NextLogits]) -> Around:
        """What a rollout's passes run within."""
        return nullcontext if make_step is make_compiled_step else partial(packed_linears, self.model)

    def _graph_ways(self) -> list[Way]:
        keys_dtype = self.autocast_dtype or self.model.dtype
        no_flash = flash.why_not(self.model, self.device, keys_dtype)
        if implementation_of(self.model) not in PLAIN:
            no_flash = f"the model attends by {implementation_of(self.model)}"
        plain = (make_graph_step, "one CUDA graph a step, and attention under masks")
        if no_flash is not None:
            return [(plain[0], f"{plain[1]}: the flash kernel is not used, because {no_flash}")]
        return [(make_graph_step_by_length, "one CUDA graph a step, and the flash kernel"), plain]

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """Within it, a copy holds the policy's weights."""
        if self.policy is None or not self.copies:
            yield
            return
        try:
            _resize(self.model, holds=True)
            self.policy.copy_into(self.model)
            yield
        finally:
            if self.kept is None:
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

    def _ended(self, key: int, token_ids: list[int], stop: StopStrings) -> bool:
        """Whether a completion is over with its last token."""
        return token_ids[-1] in self.stop_token_ids or stop.ends(token_ids)

    def _completion(self, sequence: SampledSequence) -> Completion:
        return Completion(
            token_ids=sequence.tokens,
            sampler_logprobs=sequence.logprobs,
            status=Status.STOP if sequence.stopped else Status.LENGTH,
            text=self.completion_text.of(sequence.tokens),
            versions=[VersionSpan(0, len(sequence.tokens), self.version)],
        )
