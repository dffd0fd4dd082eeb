"""Weights laid out for products with few rows: what decoding on a CPU spends its time on.

A plain ``linear`` of 8 or 32 rows runs at a quarter to a tenth of a large product's speed in float32, because the
weight is in the wrong order for it; in oneDNN's own order, made once a rollout, it is up to three times as fast
(docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

ROWS = 64  # the number of rows that the layout is made for; others use it as well


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Within it, every ``nn.Linear`` of a model on a CPU multiplies by a packed copy of its weight.

    The copies, as large as the weights, are made when it opens and gone when it closes. Elsewhere, and under autocast
    (where a layer's weight is not what it multiplies by), it does nothing.
    """
    packed: list[nn.Linear] = []
    try:
        if _can_pack() and not torch.is_autocast_enabled("cpu"):
            for module in model.modules():
                if type(module) is nn.Linear and module.weight.device.type == "cpu":
                    module.forward = _packed_forward(module.weight, module.bias)
                    packed.append(module)
        yield
    finally:
        for module in packed:
            del module.forward  # the class's own again


def _can_pack() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _packed_forward(weight: torch.Tensor, bias: torch.Tensor | None):
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    bias = None if bias is None else bias.detach()
    multiply = torch.ops.mkldnn._linear_pointwise

    def forward(x: torch.Tensor) -> torch.Tensor:
        return multiply(x, packed, bias, "none", [], "")

    return forward
