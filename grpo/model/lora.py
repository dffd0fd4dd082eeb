"""LoRA adapters (arXiv:2106.09685): added to a model, and removed from or merged into a copy of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

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
        exclude_modules=_routers(causal_lm) if lora.target_modules == "all-linear" else None,
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


def deltas_of(
    causal_lm: nn.Module, state: dict[str, torch.Tensor], gather: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Callable[[], torch.Tensor]]:
    """For each weight with an adapter, by its name without: how to compute what the adapter adds, scaling * B A.
    ``gather`` makes a tensor of ``state`` whole."""

    def delta(owner: str, layer: Any) -> torch.Tensor:
        names = [name for name, _ in layer.named_parameters() if not name.startswith("base_layer.")]
        # The layer's own parameters may be sharded.
        return functional_call(_Delta(layer), {f"layer.{name}": gather(state[f"{owner}.{name}"]) for name in names})

    return {f"{owner}.weight": partial(delta, owner, layer) for owner, layer in _lora_layers(causal_lm).items()}


class _Delta(nn.Module):
    """What an adapter adds to its layer's weight."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(self) -> torch.Tensor:
        return self.layer.get_delta_weight(self.layer.active_adapters[0])


@contextmanager
def without_adapters(peft_model: Any) -> Iterator[None]:
    """Within it, passes without gradients are those of the base."""
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    with peft_model.disable_adapter():
        # peft freezes them meanwhile. FSDP2 asks once, at the first pass, which of its weights are trained.
        for parameter in trained:
            parameter.requires_grad_(True)
        yield


def _lora_layers(causal_lm: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer)}


def _routers(causal_lm: nn.Module) -> list[str] | None:
    """Routers that are linear layers by their class and give more than a product (Llama 4's, PhiMoE's). peft would take
    them for linear ones, and fail in the first pass."""
    linear = (name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear) and _routes(module))
    return list(linear) or None


def _routes(module: nn.Module) -> bool:
    return "Router" in type(module).__name__ and type(module).forward is not nn.Linear.forward
