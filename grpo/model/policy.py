"""The policy: the model that learns, its reference and its optimizer, as accelerate wraps them."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from grpo import kernels
from grpo.config import Recipe
from grpo.model.devices import compute_dtype
from grpo.model.loading import load_weights
from grpo.model.logprob_lm import LogprobLM
from grpo.model.lora import add_adapters, base_of, merged_state
from grpo.model.optimizer import make_optimizer
from grpo.model.packed_check import why_padded
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

        torch.manual_seed(key(recipe.training.seed, Stream.ADAPTERS.value) >> 1)
        causal_lm = load_weights(recipe.model, self.compute_dtype if self.is_lora else torch.float32)
        self.peft_model = add_adapters(causal_lm, recipe.model.lora) if recipe.model.lora else None
        self.causal_lm = causal_lm
        if recipe.model.gradient_checkpointing:
            causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.kernels, says = recipe.model.kernels, accelerator.is_main_process
        cannot_pack = kernels.install(
            causal_lm, self.device, trains=True, alone=self._alone(), wanted=self.kernels, says=says
        )
        logprob_lm = LogprobLM(causal_lm)
        logprob_lm.check_head()
        self.packed = self._can_pack(logprob_lm, cannot_pack)
        self.reference = self._frozen_reference(recipe) if needs_reference and not self.is_lora else None
        self.needs_reference = needs_reference

        optimizer = make_optimizer(logprob_lm, recipe.optimizer, several_processes=accelerator.num_processes > 1)
        self.model, self.optimizer = accelerator.prepare(logprob_lm.train(), optimizer)
        self.sharded = any(isinstance(p, DTensor) for p in self.model.parameters())

    def _can_pack(self, logprob_lm: LogprobLM, why: str | None) -> bool:
        why = why or why_padded(logprob_lm, self.device, self.compute_dtype)
        if self.accelerator.is_main_process:
            log.info(
                "update: %s",
                "packed rows, each prompt computed once for its completions"
                if why is None
                else f"padded rows, which are slower, for {type(self.causal_lm).__name__}: {why}",
            )
        return why is None

    def collate(self, micro_batch: list[TrainedSequence]) -> Batch:
        """The tensors that ``logprobs`` takes, on this process's device."""
        return collate(micro_batch, pad_token_id=self.tokenizer.pad_token_id, device=self.device, packed=self.packed)

    def _frozen_reference(self, recipe: Recipe) -> LogprobLM:
        # A moving reference accumulates small steps, which bfloat16 would round away.
        dtype = torch.float32 if recipe.algorithm.sync_ref_model else self.compute_dtype
        reference = self.empty_copy(dtype)
        reference.load_state_dict({name: t.to(dtype) for name, t in self.causal_lm.state_dict().items()})
        return LogprobLM(reference).eval().requires_grad_(False)

    def empty_copy(self, dtype: torch.dtype) -> PreTrainedModel:
        """A model of the same shape and device, weights not yet loaded: to generate with, or as a reference."""
        twin = AutoModelForCausalLM.from_config(
            self.causal_lm.config, dtype=dtype, attn_implementation=self.causal_lm.config._attn_implementation
        )
        # Its linear layers then compute as the policy's do, to the bit.
        kernels.install(twin, self.device, trains=False, alone=self._alone(), wanted=self.kernels)
        return twin.to(self.device).eval().requires_grad_(False)

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
            return self.reference(batch, temperature)[0]

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
        state = self.full_state()
        for name, parameter in self.reference.causal_lm.named_parameters():  # tied weights come once here
            parameter.lerp_(state[name].to(parameter), alpha)

    @torch.no_grad()
    def full_state(self) -> dict[str, torch.Tensor]:
        """The causal LM's whole state by ``from_pretrained``'s names, gathered from every process, LoRA adapters merged
        (in a copy: the policy's own weights are not touched). Called by all processes."""
        named = self.accelerator.unwrap_model(self.model).state_dict().items()
        state = {name.removeprefix("causal_lm."): _whole(tensor) for name, tensor in named}
        if self.peft_model is None:
            return state
        return merged_state(self.causal_lm, state)

    @torch.no_grad()
    def base_state(self) -> dict[str, torch.Tensor]:
        """With LoRA: the frozen weights without adapters, by ``from_pretrained``'s names. Called by all processes."""
        named = self.accelerator.unwrap_model(self.model).state_dict().items()
        return base_of(self.causal_lm, {name.removeprefix("causal_lm."): _whole(tensor) for name, tensor in named})

    def save_adapter(self, folder: Path, adapter: dict[str, torch.Tensor], dtype: torch.dtype) -> Path:
        """Write ``adapter_state`` as peft does, cast to ``dtype``."""
        assert self.peft_model is not None
        self.peft_model.save_pretrained(folder, state_dict={name: t.to(dtype).cpu() for name, t in adapter.items()})
        return folder

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The LoRA adapters alone, by peft's names."""
        from peft import get_peft_model_state_dict

        return {name: _whole(t) for name, t in get_peft_model_state_dict(self.peft_model).items()}

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The part of the model that a checkpoint holds: all weights, or with LoRA the adapters (the base is fixed)."""
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        if self.peft_model is not None:
            return {name: _whole(p.detach()) for name, p in named if p.requires_grad}
        return {name: _whole(p.detach()) for name, p in named}

    def load_trained_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of ``trained_state``."""
        named = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        for name, tensor in state.items():
            _assign(named[name], tensor)

    def optimizer_state(self) -> dict[str, Any]:
        """AdamW's moments, gathered from every process where they are sharded. Called by all processes."""
        if not self.sharded:
            return self.optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``optimizer_state``."""
        if not self.sharded:
            self.optimizer.load_state_dict(state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=options)

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that ``from_pretrained`` loads: weights in the compute type, LoRA adapters merged. The
        adapters alone go into its adapter/.

        Called by all processes; the first one writes.
        """
        state = {name: t.to(self.compute_dtype).cpu() for name, t in self.full_state().items()}
        adapter = self.adapter_state() if self.peft_model is not None else None
        if self.accelerator.is_main_process:
            twin = AutoModelForCausalLM.from_config(self.causal_lm.config, dtype=self.compute_dtype)
            twin.load_state_dict(state)
            twin.tie_weights()
            twin.generation_config = self.causal_lm.generation_config
            twin.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            if adapter is not None:
                self.peft_model.save_pretrained(folder / "adapter", state_dict=adapter)
        self.accelerator.wait_for_everyone()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
