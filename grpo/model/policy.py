"""The policy: the model that learns, its reference and its optimizer, as accelerate wraps them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from grpo import kernels
from grpo.config import Recipe
from grpo.errors import RunError
from grpo.model.devices import compute_dtype
from grpo.model.first_process import on_main
from grpo.model.loading import attention_keyword, load_configs, load_weights
from grpo.model.logprob_lm import LogprobLM
from grpo.model.lora import add_adapters, base_of, merged_state
from grpo.model.optimizer import make_optimizer
from grpo.model.packed_check import in_float32, why_padded
from grpo.model.placing import assign, fill, local, match, materialize, shard, sharded_like, shell, whole, with_ties
from grpo.model.truncation import Truncation
from grpo.packing import collate
from grpo.randomness import Stream, key
from grpo.types import Batch, TrainedSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("grpo")


class Policy:
    """The trained module with everything that belongs to it.

    ``model`` is what accelerate wrapped (DDP, FSDP2, ZeRO or nothing); ``causal_lm`` the transformers model inside it.
    ``packed`` says whether it computes packed rows (``packed_check``) or needs padded ones.
    Trained weights are float32; if ``compute_dtype`` is bfloat16, passes run under autocast. With LoRA the frozen
    weights are held in the compute type and the adapters in float32.
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
        self.compute_dtype = compute_dtype(recipe.model.dtype, self.device)
        self.max_grad_norm = recipe.optimizer.max_grad_norm
        self.is_lora = recipe.model.lora is not None
        self.truncation = Truncation(recipe.rollout.top_k, recipe.rollout.top_p, recipe.rollout.min_p)

        self.trust_remote_code = recipe.model.trust_remote_code
        self.needs_reference = needs_reference

        # One process on a CPU trains on the model as it is read. Otherwise every process gets a shell, which the first
        # process's model fills: in shards, on a device, in another type than that of the file.
        as_read = accelerator.num_processes == 1 and self.device.type == "cpu"
        weights = self.compute_dtype if self.is_lora else torch.float32
        read = self._read(recipe, weights if as_read or weights != torch.float32 else None)
        self.causal_lm, self.peft_model = self._shell(recipe, weights) if read is None or not as_read else read
        logprob_lm = LogprobLM(self.causal_lm).train()
        source = LogprobLM(read[0]) if read is not None else None
        del read
        several = accelerator.num_processes > 1
        if not as_read:
            match(logprob_lm, source, weights)
        if accelerator.is_fsdp2:
            self.model = shard(logprob_lm, accelerator)
        if not as_read:
            materialize(logprob_lm, self.device)
            fill(logprob_lm, source, several=several)
        del source
        optimizer = make_optimizer(logprob_lm, recipe.optimizer, several_processes=several)
        if accelerator.is_fsdp2:  # accelerate would shard the model itself, and then fill it in its own way
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(logprob_lm, optimizer)
        self.sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
        self.reference = self._frozen_reference(recipe) if needs_reference and not self.is_lora else None

    def _read(self, recipe: Recipe, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Any] | None:
        """The model with its weights, on the CPU of the first process; None on the others. It is checked there, and
        ``packed`` set on all."""
        read: list[tuple[PreTrainedModel, Any]] = []

        def work() -> str | None:
            causal_lm = load_weights(recipe.model, dtype)
            peft_model, cannot_pack = self._equip(causal_lm, recipe)
            read.append((causal_lm, peft_model))
            logprob_lm = LogprobLM(causal_lm)
            with in_float32(logprob_lm):
                logprob_lm.check_head()
            return cannot_pack or why_padded(logprob_lm, self.device, self.compute_dtype)

        why = on_main(self.accelerator, work)
        self.packed = why is None
        if self.accelerator.is_main_process:
            log.info(
                "update: %s",
                "packed rows, each prompt computed once for its completions"
                if why is None
                else f"padded rows, which are slower, for {type(read[0][0]).__name__}: {why}",
            )
        return read[0] if read else None

    def _shell(self, recipe: Recipe, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
        """The same model without weights.

        Raises:
            RunError: rows are to be packed, and this process can't.
        """
        config, generation_config = load_configs(recipe.model)
        causal_lm = shell(config, dtype, self.trust_remote_code, **attention_keyword(recipe.model))
        causal_lm.generation_config = generation_config
        peft_model, cannot_pack = self._equip(causal_lm, recipe)
        if self.packed and cannot_pack:
            raise RunError(
                f"the first process packs rows, but rank {self.accelerator.process_index} can't: {cannot_pack}"
            )
        return causal_lm, peft_model

    def _equip(self, causal_lm: PreTrainedModel, recipe: Recipe) -> tuple[Any, str | None]:
        """Give a model adapters and fast passes. Returns peft's model, if any, and why it can't compute packed rows."""
        torch.manual_seed(key(recipe.training.seed, Stream.ADAPTERS.value) >> 1)
        peft_model = add_adapters(causal_lm, recipe.model.lora) if recipe.model.lora else None
        if recipe.model.gradient_checkpointing:
            causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return peft_model, kernels.install(causal_lm, self.device, trains=True, alone=self._alone())

    def collate(self, micro_batch: list[TrainedSequence]) -> Batch:
        """The tensors that ``logprobs`` takes, on this process's device."""
        return collate(micro_batch, pad_token_id=self.tokenizer.pad_token_id, device=self.device, packed=self.packed)

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
        # Its linear layers then compute as the policy's do, to the bit.
        kernels.install(twin, self.device, trains=False, alone=self._alone())
        return twin

    def _alone(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.NO

    def autocast(self) -> AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def logprobs(self, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (with gradient where enabled) and entropies of a micro-batch, (B,T)."""
        with self.autocast():
            logps_BT, entropy_BT, _ = self.model(batch, temperature)
        return logps_BT, entropy_BT

    def statistics(
        self, batch: Batch, temperature: float, *, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same, the entropies with gradient if ``entropy_gradient``, and the log of the probability that the
        rollout's top-k, top-p and min-p leave of each distribution."""
        with self.autocast():
            return self.model(batch, temperature, entropy_gradient, self.truncation)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch, temperature: float) -> torch.Tensor:
        """The same under the reference model: a frozen copy, or with LoRA the model without its adapters."""
        with self.autocast():
            if self.peft_model is not None:
                with self.peft_model.disable_adapter():
                    return self.model(batch, temperature)[0]
            assert self.reference is not None
            logps_BT = self.reference(batch, temperature)[0]
            if isinstance(self.reference, FSDPModule):
                self.reference.reshard()  # FSDP2 keeps embedding and head whole for a backward pass, which never comes
            return logps_BT

    def no_sync(self) -> AbstractContextManager:
        """Within it, backward passes do not synchronize gradients (for all but the last micro-batch of a step)."""
        return self.accelerator.no_sync(self.model)

    def clip_gradients(self) -> float:
        """Global gradient norm before clipping to ``max_grad_norm``; the same number on every process."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm or float("inf"))
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, learning_rate: float) -> None:
        """One optimizer step at this learning rate; gradients are cleared."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        # Fused optimizers do not raise the weights' versions, by which casts and copies of weights notice a change.
        torch.autograd.graph.increment_version([p for group in self.optimizer.param_groups for p in group["params"]])
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def mix_reference(self, alpha: float) -> None:
        """ref = alpha * policy + (1 - alpha) * ref (TR-DPO, arXiv:2404.09656)."""
        assert self.reference is not None, "the reference of a LoRA policy is its base and does not move"
        policy = dict(self.causal_lm.named_parameters())
        for name, parameter in self.reference.causal_lm.named_parameters():  # tied weights come once here
            local(parameter).lerp_(local(policy[name]).to(parameter.dtype), alpha)

    @torch.no_grad()
    def state_stream(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The causal LM's whole state by ``from_pretrained``'s names, LoRA adapters merged (in a copy: the policy's own
        weights are not touched), in ``dtype`` where one is given. Called by all processes.

        One tensor at a time is gathered from the processes. Whoever wants little memory must not keep them.
        """
        if self.peft_model is not None:
            for name, tensor in merged_state(self.causal_lm, self._gathered()).items():
                yield name, tensor if dtype is None else tensor.to(dtype)
            return
        for names, tensor in with_ties(self.causal_lm):
            gathered = whole(tensor.detach(), dtype if tensor.is_floating_point() else None)
            for name in names:
                yield name, gathered
            del gathered

    def full_state(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """What ``state_stream`` gives, all at once, on every process."""
        return dict(self.state_stream(dtype))

    @torch.no_grad()
    def copy_into(self, twin: PreTrainedModel) -> None:
        """Copy the policy's weights into an ``empty_copy``, one tensor after the other. Called by all processes."""
        targets = twin.state_dict()
        for name, tensor in self.state_stream(twin.dtype):
            targets[name].copy_(tensor)

    def _gathered(self) -> dict[str, torch.Tensor]:
        return {
            name: tensor for names, t in with_ties(self.causal_lm) for tensor in [whole(t.detach())] for name in names
        }

    @torch.no_grad()
    def base_state(self) -> dict[str, torch.Tensor]:
        """With LoRA: the frozen weights without adapters, by ``from_pretrained``'s names. Called by all processes."""
        return base_of(self.causal_lm, self._gathered())

    def save_adapter(self, folder: Path, adapter: dict[str, torch.Tensor], dtype: torch.dtype) -> Path:
        """Write ``adapter_state`` as peft does, cast to ``dtype``."""
        assert self.peft_model is not None
        self.peft_model.save_pretrained(folder, state_dict={name: t.to(dtype).cpu() for name, t in adapter.items()})
        return folder

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The LoRA adapters alone, by peft's names."""
        from peft import get_peft_model_state_dict

        return {name: whole(t) for name, t in get_peft_model_state_dict(self.peft_model).items()}

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The weights that a checkpoint holds, where they are: all, or with LoRA the adapters (the base is fixed)."""
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad or self.peft_model is None}

    def load_trained_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of ``trained_state``, for whole tensors, which every process has."""
        targets = self.trained_state()
        for name, tensor in state.items():
            assign(targets[name], tensor)

    def optimizer_state(self) -> dict[str, Any]:
        """AdamW's moments, by the places of their weights in the optimizer."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``optimizer_state``, for whole tensors, which every process has. They may be given by the names of
        their weights instead, as sharded policies once saved them."""
        if not self.sharded and all(isinstance(key, int) for key in state["state"]):
            self.optimizer.load_state_dict(state)
            return
        given = {}
        for place, (name, _) in enumerate(self._optimized()):
            for slot, value in (state["state"].get(place) or state["state"].get(name) or {}).items():
                given[f"{name}.{slot}"] = value
        self.load_moments(given)

    def moments(self) -> dict[str, torch.Tensor]:
        """What the optimizer keeps of each weight, by ``NAME.SLOT``; sharded as the weight is."""
        state = self.optimizer.state
        return {f"{name}.{slot}": value for name, p in self._optimized() for slot, value in state.get(p, {}).items()}

    def empty_moments(self, stored: dict[str, tuple[torch.Size, torch.dtype]]) -> dict[str, torch.Tensor]:
        """Memory for moments of these whole shapes and types, sharded as their weights are."""
        weights = dict(self._optimized())
        made = {}
        for name, (shape, dtype) in stored.items():
            weight = weights[name.rpartition(".")[0]]
            made[name] = (
                torch.empty_like(weight.detach(), dtype=dtype)
                if shape == weight.shape
                else torch.empty(shape, dtype=dtype)
            )
        return made

    def load_moments(self, moments: dict[str, torch.Tensor]) -> None:
        """Inverse of ``moments``, for tensors that are whole, or sharded as their weights are."""
        slots: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in moments.items():
            weight, _, slot = name.rpartition(".")
            slots.setdefault(weight, {})[slot] = value
        state = {}
        for place, (name, weight) in enumerate(self._optimized()):
            if name in slots:
                state[place] = {
                    slot: sharded_like(value, weight) if value.shape == weight.shape else value
                    for slot, value in slots[name].items()
                }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _optimized(self) -> list[tuple[str, torch.Tensor]]:
        """The trained weights with their names, in the order in which the optimizer has them."""
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        names = {id(parameter): name for name, parameter in named}
        return [(names[id(p)], p) for group in self.optimizer.param_groups for p in group["params"]]

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that ``from_pretrained`` loads: weights in the compute type, LoRA adapters merged. The
        adapters alone go into its adapter/.

        Called by all processes; the first one writes.
        """
        main, state = self.accelerator.is_main_process, {}
        for name, tensor in self.state_stream(self.compute_dtype):
            if main:
                state[name] = tensor.cpu()
        adapter = self.adapter_state() if self.peft_model is not None else None
        if main:
            twin = shell(self.causal_lm.config, self.compute_dtype, self.trust_remote_code)
            twin.load_state_dict(state, assign=True)
            twin.tie_weights()
            twin.generation_config = self.causal_lm.generation_config
            twin.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            if adapter is not None:
                self.peft_model.save_pretrained(folder / "adapter", state_dict=adapter)
        self.accelerator.wait_for_everyone()
