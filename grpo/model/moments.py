"""What an optimizer keeps of each weight, for checkpoints: by name, and sharded as the weight is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from grpo.model.placing import cut_as, local, sharded_like

Named = list[tuple[str, torch.Tensor]]


def optimized(model: nn.Module, optimizer: Any) -> Named:
    """The trained weights with their names, in the order in which the optimizer has them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]


def moments(named: Named, optimizer: Any) -> dict[str, torch.Tensor]:
    """What the optimizer keeps, by ``NAME.SLOT``."""
    return {f"{name}.{slot}": value for name, p in named for slot, value in optimizer.state.get(p, {}).items()}


def empty_moments(named: Named, stored: dict[str, tuple[torch.Size, torch.dtype]]) -> dict[str, torch.Tensor]:
    """Memory of the host for moments of these whole shapes and types, sharded as their weights are."""
    weights = dict(named)
    return {name: _empty(shape, dtype, weights[name.rpartition(".")[0]]) for name, (shape, dtype) in stored.items()}


def _empty(shape: torch.Size, dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    if not isinstance(weight, DTensor) or not _by_rows(shape, weight):
        return torch.empty(shape, dtype=dtype)
    return cut_as(weight, torch.empty((local(weight).shape[0], *shape[1:]), dtype=dtype))


def _by_rows(shape: torch.Size, weight: torch.Tensor) -> bool:
    """Is a moment cut as its weight is? FSDP2 cuts between rows, and a moment may have other columns."""
    return len(shape) > 0 and shape[0] == weight.shape[0]


def load_moments(named: Named, optimizer: Any, found: dict[str, torch.Tensor]) -> None:
    """Inverse of ``moments``, for tensors that are whole on every process, or sharded as their weights are."""
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in found.items():
        weight_name, _, slot = name.rpartition(".")
        slots.setdefault(weight_name, {})[slot] = value
    state = {
        place: {s: sharded_like(v, weight) if _by_rows(v.shape, weight) else v for s, v in slots[name].items()}
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
