"""What an optimizer keeps of each weight, for checkpoints: by name, and sharded as the weight is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grpo.model.placing import sharded_like

Named = list[tuple[str, torch.Tensor]]


def optimized(model: nn.Module, optimizer: Any) -> Named:
    """The trained weights with their names, in the order in which the optimizer has them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]


def moments(named: Named, optimizer: Any) -> dict[str, torch.Tensor]:
    """What the optimizer keeps, by ``NAME.SLOT``."""
    return {f"{name}.{slot}": value for name, p in named for slot, value in optimizer.state.get(p, {}).items()}


def empty_moments(named: Named, stored: dict[str, tuple[torch.Size, torch.dtype]]) -> dict[str, torch.Tensor]:
    """Memory for moments of these whole shapes and types; those of a weight's shape are sharded as it is."""
    weights = dict(named)
    made = {}
    for name, (shape, dtype) in stored.items():
        weight = weights[name.rpartition(".")[0]].detach()
        made[name] = torch.empty_like(weight, dtype=dtype) if shape == weight.shape else torch.empty(shape, dtype=dtype)
    return made


def load_moments(named: Named, optimizer: Any, found: dict[str, torch.Tensor]) -> None:
    """Inverse of ``moments``, for tensors that are whole on every process, or sharded as their weights are."""
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in found.items():
        weight_name, _, slot = name.rpartition(".")
        slots.setdefault(weight_name, {})[slot] = value
    state = {
        place: {s: sharded_like(v, weight) if v.shape == weight.shape else v for s, v in slots[name].items()}
        for place, (name, weight) in enumerate(named)
        if name in slots
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def from_saved(named: Named, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """An optimizer's saved state by ``NAME.SLOT``. It was saved by the places of weights, or once, of sharded weights,
    by their names."""
    return {
        f"{name}.{slot}": value
        for place, (name, _) in enumerate(named)
        for slot, value in (state["state"].get(place) or state["state"].get(name) or {}).items()
    }
