"""Logits in float32 from a head in bfloat16: the product's sums are handed out as they are, not rounded.

A GPU multiplies bfloat16 numbers and adds in float32. To round the sums to bfloat16 costs a logit of 20 up to 0.06, and
a token's log-probability as much, differently in sampler and trainer. It saves nothing but half of a chunk of logits.
The gradient of the logits is rounded before its products, as before.

On a GPU this is ``mm(out_dtype=float32)`` (torch 2.8), not yet run on one. Elsewhere a product of the rounded numbers
in float32 gives the same to the order of its sums, and takes longer.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from grpo.kernels import grads_in_place


def why_not(causal_lm: Any, device: torch.device) -> str | None:
    """Why this model's head can't have it on ``device``, or None."""
    head = causal_lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, not a linear layer"
    if device.type == "cuda" and "dtype" not in torch.ops.aten.mm.overloads():
        return f"torch {torch.__version__} has no mm(out_dtype=...)"
    return None


def install(causal_lm: Any, *, alone: bool) -> None:
    """``alone``: the head adds its gradient itself, as ``grads_in_place`` has it."""
    head = causal_lm.get_output_embeddings()
    head.forward = MethodType(_in_place_forward if alone else _forward, head)


def _in_place_forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    made = grads_in_place.linear(self, x, product)
    return _forward(self, x) if made is None else made


def _forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _Product.apply(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def product(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b in float32, from numbers of any type."""
    x_NI = x.flatten(0, -2)
    if x.dtype == torch.float32:
        return nn.functional.linear(x, weight_OI, bias_O)
    wide = torch.mm(x_NI, weight_OI.T, out_dtype=torch.float32) if x.is_cuda else x_NI.float() @ weight_OI.float().T
    out = wide if x.ndim == 2 else wide.unflatten(0, x.shape[:-1])  # a view could not be overwritten by its gradient
    return out if bias_O is None else out + bias_O.float()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI, bias_O):
        ctx.save_for_backward(x, weight_OI)
        return product(x, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight_OI = ctx.saved_tensors
        grad = grad.to(x.dtype)
        grad_NO = grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            grad @ weight_OI if needs_x else None,
            grad_NO.T @ x.flatten(0, -2) if needs_weight else None,
            grad_NO.sum(0) if needs_bias else None,
        )
