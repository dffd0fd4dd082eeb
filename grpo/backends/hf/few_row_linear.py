"""Weights laid out for matrix products with few rows, where decoding on a CPU through transformers spends its time.

A plain ``linear`` of 8 or 32 rows runs at a quarter to a tenth of a large product's speed in float32, because the
weight is in the wrong order. A copy in the right one is up to three times as fast: transposed, or for large weights in
oneDNN's own order. Each rollout makes the copies anew (docs/performance.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

log = logging.getLogger("grpo")

ROWS = 64  # the number of rows that oneDNN's order is made for; it serves others too
SMALL = 2**19  # entries of a float32 weight; up to here a transposed copy, which MKL reads, is as fast or faster
# Private operations of torch's: they may be gone.
REORDER, MULTIPLY, BFLOAT16_SUPPORTED = "_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Within it, every ``nn.Linear`` of a model on a CPU multiplies by a packed copy of its weight.

    The copies take as much memory as the weights. It does nothing elsewhere, and nothing under autocast, where a layer
    does not multiply by its weight but by a cast of it. A layer that is given another weight for the length of a pass,
    as peft does with a router that gets an adapter, multiplies by that one.
    """
    before: list[tuple[Any, Callable | None]] = []  # layers, and a forward that was not the class's (grads_in_place)
    try:
        if _can_pack() and not torch.is_autocast_enabled("cpu"):
            for module in model.modules():
                if type(module) is nn.Linear and _fits(module.weight):
                    before.append((module, vars(module).get("forward")))
                    vars(module)["forward"] = _forward(module)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@cache
def _can_pack() -> bool:
    mkldnn = torch.ops.mkldnn
    if torch.backends.mkldnn.is_available() and hasattr(mkldnn, REORDER) and hasattr(mkldnn, MULTIPLY):
        return True
    log.info("decoding: torch %s can't reorder weights for oneDNN; linear layers are slower without", torch.__version__)
    return False


def _fits(weight: torch.Tensor) -> bool:
    """Whether it is a weight that stays through a rollout, which one that a hook makes for each pass does not; and
    whether oneDNN multiplies by it, by bfloat16 not on every CPU."""
    if not isinstance(weight, nn.Parameter):
        return False
    if weight.dtype == torch.bfloat16 and not getattr(torch.ops.mkldnn, BFLOAT16_SUPPORTED, lambda: False)():
        return False
    return weight.device.type == "cpu"


def _forward(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = (None if p is None else p.detach() for p in (module.weight, module.bias))
    assert weight is not None
    small = weight.dtype == torch.float32 and weight.numel() <= SMALL
    packed = _transposed_forward(weight, bias) if small else _packed_forward(weight, bias)
    return lambda x: nn.Linear.forward(module, x) if is_parametrized(module) else packed(x)


def _packed_forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = getattr(torch.ops.mkldnn, REORDER)(weight, ROWS)
    multiply = getattr(torch.ops.mkldnn, MULTIPLY)
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _transposed_forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    transposed = weight.t().contiguous()
    if bias is None:
        return lambda x: torch.matmul(x, transposed)
    return lambda x: torch.addmm(bias, x.flatten(0, -2), transposed).unflatten(0, x.shape[:-1])
