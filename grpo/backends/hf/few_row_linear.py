"""Weights laid out for products with few rows: what decoding on a CPU spends its time on.

A plain ``linear`` of 8 or 32 rows runs at a quarter to a tenth of a large product's speed in float32, because the
weight is in the wrong order for it. Transposed, or for large weights in oneDNN's own order, made once a rollout, it is
up to three times as fast (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

ROWS = 64  # the number of rows that oneDNN's order is made for; others use it as well
SMALL = 2**19  # entries of a float32 weight; up to here MKL and a transposed copy are as fast or faster


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Within it, every ``nn.Linear`` of a model on a CPU multiplies by a packed copy of its weight.

    The copies, as large as the weights, are made when it opens and gone when it closes. Elsewhere, and under autocast
    (where a layer's weight is not what it multiplies by), it does nothing.
    """
    before: list[tuple[nn.Linear, Callable | None]] = []  # a forward that was not the class's (grads_in_place)
    try:
        if _can_pack() and not torch.is_autocast_enabled("cpu"):
            for module in model.modules():
                if type(module) is nn.Linear and module.weight.device.type == "cpu":
                    before.append((module, vars(module).get("forward")))
                    module.forward = _forward(module)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _can_pack() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _forward(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = (None if p is None else p.detach() for p in (module.weight, module.bias))
    made = _transposed_forward if weight.dtype == torch.float32 and weight.numel() <= SMALL else _packed_forward
    return made(weight, bias)


def _packed_forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _transposed_forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    transposed = weight.t().contiguous()
    if bias is None:
        return lambda x: torch.matmul(x, transposed)
    return lambda x: torch.addmm(bias, x.flatten(0, -2), transposed).unflatten(0, x.shape[:-1])
