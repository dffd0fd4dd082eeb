"""The policy: the model that learns, its reference and its optimizer, as accelerate wraps them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from grpo import kernels
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.model.devices import compute_dtype
from grpo.model.export import write_adapter, write_final
from grpo.model.first_process import on_main
from grpo.model.kept import kept, set_types
from grpo.model.logprob_lm import LogprobLM
from grpo.model.lora import base_of, deltas_of, without_adapters
from grpo.model.moments import Named, from_saved, load_moments, optimized
from grpo.model.optimizer import make_optimizer
from grpo.model.placing import assign, is_sharded, local, materialize, shard, shell, whole
from grpo.model.processes import Collectives, average_gradients, replicas, to_rest
from grpo.model.quantized import is_quantized, numbers, without_scales
from grpo.model.start import start
from grpo.model.truncation import Truncation
from grpo.packing import collate
from grpo.types import Batch, TrainedSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("grpo")


class Policy:
    """The trained module with everything that belongs to it.

    ``model`` is a ``LogprobLM``, ``causal_lm`` the transformers model inside it. Over several processes it is whole on
    each, or sharded by FSDP2 (``processes``), and so is ``reference``. ``packed`` says whether it computes packed rows
    (``packed_check``) or needs padded ones.
    Trained weights are float32, or bfloat16 where ``model.weights`` says so (``compact_adamw`` keeps the rest of each
    number). If ``compute_dtype`` is bfloat16, passes run under autocast, and sharded weights are gathered in bfloat16.
    With LoRA the frozen weights are held in the compute type, or linear layers' in 4 bits (``quantized``), and the
    adapters in float32.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: list[int],
        needs_reference: bool,
    ):
        self.accelerator = accelerator
        self.tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids
        self.device = accelerator.device
        self.sharded = is_sharded(accelerator)
        self.compute_dtype = compute_dtype(recipe.model.dtype, self.device)
        self.weights_dtype = _weights_dtype(recipe, self.compute_dtype)
        self.max_grad_norm = recipe.optimizer.max_grad_norm
        self.is_lora = recipe.model.lora is not None
        self.truncation = Truncation(recipe.rollout.top_k, recipe.rollout.top_p, recipe.rollout.min_p)

        self.trust_remote_code = recipe.model.trust_remote_code
        self.kernels = recipe.model.kernels
        self.needs_reference = needs_reference

        weights = self.compute_dtype if self.is_lora else self.weights_dtype
        self.model, self.peft_model, self.packed = start(recipe, accelerator, tokenizer, weights, self.compute_dtype)
        self.causal_lm = self.model.causal_lm
        self.kept = self._kept()
        self.longest_sequence = recipe.longest_sequence()
        pad = tokenizer.pad_token_id  # what pads counts nowhere, but must have an embedding
        self.pad_token_id = pad if pad is not None and 0 <= pad < self.model.vocab_size else 0
        optimizer = make_optimizer(self.model, recipe.optimizer, sharded=self.sharded)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.reference = self._frozen_reference(recipe) if needs_reference and not self.is_lora else None
        self.replicas = replicas(accelerator)
        held = [model for model in (self.model, self.reference) if model is not None]
        self.collectives = Collectives(*held) if self.sharded else None
        self.changes = 0  # how often weights, of the policy or a moving reference, were written to

    def collate(self, micro_batch: list[TrainedSequence]) -> Batch:
        """The tensors that ``logprobs`` takes, on this process's device."""
        return collate(micro_batch, pad_token_id=self.pad_token_id, device=self.device, packed=self.packed)

    @torch.no_grad()
    def _frozen_reference(self, recipe: Recipe) -> LogprobLM:
        """A copy of the policy's weights, sharded if they are."""
        # A moving reference accumulates small steps, which bfloat16 would round away.
        dtype = torch.float32 if recipe.algorithm.sync_ref_model else self.compute_dtype
        reference = LogprobLM(self._twin(dtype)).eval().requires_grad_(False)
        if self.sharded:
            shard(reference, self.accelerator)
        materialize(reference, self.device)
        policy = dict(self.causal_lm.state_dict())
        for name, tensor in reference.causal_lm.state_dict().items():
            local(tensor).copy_(local(policy[name]))
        return reference

    def empty_copy(self, dtype: torch.dtype) -> PreTrainedModel:
        """A model of the same shape on the same device, whole, weights not yet loaded: to generate with."""
        twin = self._twin(dtype)
        materialize(twin, self.device)
        return twin.eval().requires_grad_(False)

    def _twin(self, dtype: torch.dtype) -> PreTrainedModel:
        config = self.causal_lm.config
        twin = shell(config, dtype, self.trust_remote_code, attn_implementation=config._attn_implementation)
        if dtype != torch.float32:
            set_types(twin, self.kept)
        # Its linear layers then compute as the policy's do, to the bit.
        kernels.install(twin, self.device, trains=False, alone=not self.sharded, wanted=self.kernels)
        return twin

    def _kept(self) -> dict[str, torch.dtype]:
        """Tensors that copies in the compute type hold as the policy does, and their types."""
        if self.compute_dtype == torch.float32:
            return {}
        twin, state = shell(self.causal_lm.config, self.compute_dtype, self.trust_remote_code), self._base()
        return {name: state[name].dtype for name in kept(twin, self.compute_dtype)}

    def autocast(self) -> AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def logprobs(self, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (with gradient where enabled) and entropies of a micro-batch, (B,T)."""
        logps_BT, entropy_BT, _ = self._pass(self.model, batch, temperature)
        return logps_BT, entropy_BT

    def statistics(
        self, batch: Batch, temperature: float, *, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same, the entropies with gradient if ``entropy_gradient``, and the log of the probability that the
        rollout's top-k, top-p and min-p leave of each distribution."""
        return self._pass(self.model, batch, temperature, entropy_gradient, self.truncation)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch, temperature: float) -> torch.Tensor:
        """The same under the reference model: a frozen copy, or with LoRA the model without its adapters."""
        if self.peft_model is not None:
            with without_adapters(self.peft_model):
                return self._pass(self.model, batch, temperature)[0]
        assert self.reference is not None
        return self._pass(self.reference, batch, temperature)[0]

    def _pass(self, model: LogprobLM, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self.autocast():
            found = model(*arguments)
        if not torch.is_grad_enabled():
            self.end_pass()
        return found

    def end_pass(self) -> None:
        """After a pass that failed, or that no backward pass follows."""
        if self.sharded:
            to_rest(self.model)
            if self.reference is not None:
                to_rest(self.reference)

    def average_gradients(self) -> None:
        """Over the processes that hold the same weights. Sharded gradients are averaged over shards already."""
        if self.replicas is not None:
            average_gradients([p for p in self.model.parameters() if p.requires_grad], self.replicas)

    def clip_gradients(self) -> float:
        """Global gradient norm before clipping to ``max_grad_norm``; the same number on every process."""
        limit = self.max_grad_norm or float("inf")
        if self.weights_dtype == torch.bfloat16:  # torch's own norm would be rounded to it
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norms = [whole(torch.linalg.vector_norm(g, dtype=torch.float32)) for g in gradients]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        else:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return float(whole(norm))

    def step(self, learning_rate: float) -> None:
        """One optimizer step at this learning rate; gradients are cleared."""
        self.changed()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        # Fused optimizers do not raise the weights' versions, by which casts and copies of weights notice a change.
        torch.autograd.graph.increment_version([p for group in self.optimizer.param_groups for p in group["params"]])
        self.optimizer.zero_grad(set_to_none=True)

    def changed(self) -> None:
        """Weights are written to from here on, so they are not those of the step before."""
        self.changes += 1

    @torch.no_grad()
    def mix_reference(self, alpha: float) -> None:
        """ref = alpha * policy + (1 - alpha) * ref (TR-DPO, arXiv:2404.09656)."""
        assert self.reference is not None, "the reference of a LoRA policy is its base and does not move"
        self.changed()
        policy = dict(self.causal_lm.named_parameters())
        for name, parameter in self.reference.causal_lm.named_parameters():  # tied weights come once here
            local(parameter).lerp_(local(policy[name]).to(parameter.dtype), alpha)

    def state_stream(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The causal LM's whole state by ``from_pretrained``'s names, LoRA adapters merged (in a copy: the policy's own
        weights are not touched), in ``dtype`` where one is given, but for what the model keeps in its own type. Called
        by all processes.

        One tensor at a time is gathered from the processes. Whoever wants little memory must not keep them.
        """
        kept = {} if dtype == torch.float32 else self.kept
        return self._stream(lambda name: None if dtype is None else kept.get(name, dtype))

    @torch.no_grad()
    def _stream(self, type_of: Callable[[str], torch.dtype | None]) -> Iterator[tuple[str, torch.Tensor]]:
        state = self._state()
        base, deltas = state, {}
        if self.peft_model is not None:
            base, deltas = base_of(self.causal_lm, state), deltas_of(self.causal_lm, state, whole)
        names_of = Counter(id(tensor) for tensor in base.values())
        tied: dict[int, torch.Tensor] = {}
        for name, tensor in base.items():
            to = type_of(name) if tensor.is_floating_point() or is_quantized(tensor) else None
            if name in deltas:  # computed in float32
                weight = whole(numbers(tensor))
                gathered = (weight.float() + deltas[name]().float()).to(to or weight.dtype)
            else:
                gathered = tied.get(id(tensor))
                gathered = whole(numbers(tensor), to) if gathered is None else gathered
                if names_of[id(tensor)] > 1:
                    tied[id(tensor)] = gathered
            yield name, gathered
            del gathered

    def full_state(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """What ``state_stream`` gives, all at once, on every process."""
        return dict(self.state_stream(dtype))

    @torch.no_grad()
    def copy_into(self, twin: PreTrainedModel) -> None:
        """Copy the policy's weights into an ``empty_copy``, one tensor after the other. Called by all processes."""
        targets = twin.state_dict()
        for name, tensor in self._stream(lambda name: targets[name].dtype):
            targets[name].copy_(tensor)

    @torch.no_grad()
    def base_state(self) -> dict[str, torch.Tensor]:
        """With LoRA: the frozen weights without adapters, by ``from_pretrained``'s names. Called by all processes."""
        state = self._state()
        gathered = {key: whole(numbers(tensor)) for key, tensor in {id(t): t for t in state.values()}.items()}
        return base_of(self.causal_lm, {name: gathered[id(tensor)] for name, tensor in state.items()})

    def _base(self) -> dict[str, torch.Tensor]:
        """The causal LM's own tensors, as they are, by ``from_pretrained``'s names, without adapters."""
        return base_of(self.causal_lm, self._state()) if self.peft_model is not None else self._state()

    def _state(self) -> dict[str, torch.Tensor]:
        """The causal LM's own tensors by name."""
        return without_scales(self.causal_lm.state_dict(keep_vars=True))

    def save_adapter(self, folder: Path, adapter: dict[str, torch.Tensor], dtype: torch.dtype) -> Path:
        """Write ``adapter_state`` as peft does, cast to ``dtype``."""
        assert self.peft_model is not None
        write_adapter(folder, self.peft_model, {name: t.to(dtype).cpu() for name, t in adapter.items()})
        return folder

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The LoRA adapters alone, by peft's names."""
        from peft import get_peft_model_state_dict

        # Adapters alone, also of embeddings: "auto" would add what they are added to, and ask a hub about its size.
        state = get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        return {name: whole(t) for name, t in state.items()}

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The weights that a checkpoint holds, where they are: all, or with LoRA the adapters (the base is fixed)."""
        named = self.model.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad or self.peft_model is None}

    def load_trained_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of ``trained_state``, for whole tensors, which every process has."""
        targets = dict(self.model.named_parameters())  # also those that an older version trained
        for name, tensor in state.items():
            assign(targets[name], tensor)

    def optimizer_state(self) -> dict[str, Any]:
        """AdamW's moments, by the places of their weights in the optimizer."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``optimizer_state``, for whole tensors, which every process has."""
        named = optimized(self.model, self.optimizer)
        as_now = sum(len(group["params"]) for group in state["param_groups"]) == len(named)
        if not self.sharded and as_now and all(isinstance(key, int) for key in state["state"]):
            self.optimizer.load_state_dict(state)
        else:
            load_moments(named, self.optimizer, from_saved(named if as_now else self._once_optimized(), state))

    def _once_optimized(self) -> Named:
        """What the optimizer held, in its order, before weights that text does not reach were frozen."""
        every = [(n, p) for n, p in self.model.named_parameters() if self.peft_model is None or "lora_" in n]
        return sorted(every, key=lambda named: named[1].ndim < 2)

    def save_pretrained(self, folder: Path, card: Callable[[], str | None] = lambda: None) -> None:
        """Write a folder that ``from_pretrained`` loads, whole or not at all: weights in the compute type (but for what
        the model keeps in its own), LoRA adapters merged. The adapters alone go into its adapter/, and what ``card``
        says, called on the first process, into its README.md.

        Called by all processes; the first one writes. Raises RunError, on all, where the disk refuses.
        """
        main, state = self.accelerator.is_main_process, {}
        for name, tensor in self.state_stream(self.compute_dtype):
            if main:
                state[name] = tensor.cpu()
        adapter = self.adapter_state() if self.peft_model is not None else None

        def write() -> None:
            write_final(
                folder,
                self.causal_lm,
                state,
                self.compute_dtype,
                self.tokenizer,
                trust_remote_code=self.trust_remote_code,
                peft_model=self.peft_model,
                adapter=adapter,
                card=card(),
            )

        on_main(self.accelerator, write)


def _weights_dtype(recipe: Recipe, compute: torch.dtype) -> torch.dtype:
    """The type of trained weights but adapters. Raises UserError where passes do not compute in it."""
    if recipe.model.weights == "float32":
        return torch.float32
    if compute != torch.bfloat16:
        raise UserError(
            f"model.weights: bfloat16 needs the compute type bfloat16, which model.dtype: {recipe.model.dtype} is not "
            "on this device; set model.dtype: bfloat16, or model.weights: float32"
        )
    return torch.bfloat16
