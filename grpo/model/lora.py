"""LoRA adapters (arXiv:2106.09685): added to a model, and removed from or merged into a copy of its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grpo.config import LoraConfig
from grpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapters(causal_lm: PreTrainedModel, lora: LoraConfig) -> Any:
    """The model with LoRA adapters (arXiv:2106.09685), trained in float32; returns peft's PeftModel."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    peft_config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = get_peft_model(causal_lm, peft_config)
    except ValueError as error:
        raise UserError(f"model.lora: {error}") from error
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def base_of(causal_lm: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA model's ``state`` without its adapters, by the names from before they were added."""
    layers = _lora_layers(causal_lm)
    base = {}
    for name, tensor in state.items():
        owner, found, parameter = name.partition(".base_layer.")
        if found and owner in layers:
            base[f"{owner}.{parameter}"] = tensor
        elif not any(name.startswith(f"{owner}.") for owner in layers):
            base[name] = tensor
    return base


def merged_state(causal_lm: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with the adapters merged: base + scaling * B A, computed in float32."""
    merged = base_of(causal_lm, state)
    for owner, layer in _lora_layers(causal_lm).items():
        weight = merged[f"{owner}.weight"]
        delta = layer.get_delta_weight(layer.active_adapters[0])
        merged[f"{owner}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return merged


def _lora_layers(causal_lm: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer)}
