"""Backward passes of linear layers and embeddings that add their weight's gradient to ``weight.grad`` themselves.

Autograd makes a micro-batch's gradient beside the sum of the earlier ones, and adds it in a pass of its own. With tied
weights, the head's gradient of V x H numbers is made at the peak of memory, and is kept until the embedding's joins it
at the end. That one is as large, and zero except in the rows of a few hundred tokens. Here the product is added as it
is computed, and only rows of tokens that were seen are touched. Gradients are the same, to rounding.

Under autocast a weight is cast for its product, forward and again backward, and only the last cast is kept. Passes
without gradients do the same, so that both give the same numbers.

DDP and FSDP listen to gradients as autograd hands them over, so this is for one process alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import NamedTuple

import torch
from torch import nn

# Private names of torch: what waits for a weight's gradient.
HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
BLOCK = 4096  # if gradients have to be added in another type, this many rows of a weight at once


def missing() -> str | None:
    """The first private name that this file needs and this torch does not have."""
    weight = torch.zeros(1, requires_grad=True)
    return next((f"Tensor.{name}" for name in HOOKS if not hasattr(weight, name)), None)


# x, weight, bias to their product.
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def linear(layer: nn.Linear, x: torch.Tensor, product: Product) -> torch.Tensor | None:
    """What a layer of ``install`` makes of x, but by ``product``. None where something waits for the gradient."""
    if not torch.is_grad_enabled():
        return _linear(x, layer.weight, layer.bias, product)
    return None if _is_watched(layer.weight) else _Linear.apply(x, layer.weight, layer.bias, product)


def install(module: nn.Module) -> None:
    """Make every plain linear layer and embedding in ``module`` add its gradient itself. Any other stays as it is."""
    for layer in module.modules():
        if "forward" in vars(layer):  # someone else replaced it
            continue
        if type(layer) is nn.Linear:
            layer.forward = MethodType(_linear_forward, layer)
        if type(layer) is nn.Embedding and not (layer.scale_grad_by_freq or layer.sparse or layer.max_norm):
            layer.forward = MethodType(_embedding_forward, layer)


def _linear_forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return _linear(x, self.weight, self.bias)
    if _is_watched(self.weight):
        return nn.Linear.forward(self, x)
    return _Linear.apply(x, self.weight, self.bias, None)


def _embedding_forward(self: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    if not (torch.is_grad_enabled() and self.weight.requires_grad) or _is_watched(self.weight):
        return nn.Embedding.forward(self, ids)
    return _Embedding.apply(ids, self.weight, self.padding_idx)


def _is_watched(weight: torch.Tensor) -> bool:
    """Does something wait for autograd to hand it the gradient?"""
    return not weight.is_leaf or any(getattr(weight, name) for name in HOOKS)


def _linear(
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, product: Product | None = None
) -> torch.Tensor:
    device = x.device.type
    dtype = _computed_in(x)
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        bias_O = None if bias_O is None else bias_O.to(dtype)
        return (product or nn.functional.linear)(x.to(dtype), _cast(weight_OI, dtype), bias_O)


def _computed_in(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Last(NamedTuple):
    weight: weakref.ref[torch.Tensor]
    key: tuple[int, torch.dtype, torch.device]  # the weight's version, and the type and device asked for
    cast: torch.Tensor


_last: _Last | None = None


def _cast(weight_OI: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight rounded to ``dtype``.

    Autocast's own cast would keep the copies of all weights from the forward to the backward pass. Here they are cast
    again, and only the last one is kept, for the head's next chunk. A CUDA graph casts for itself: a cast from before
    the capture may be freed before a replay, and a replay overwrites one that was made in the capture.
    """
    global _last
    if weight_OI.dtype == dtype:
        return weight_OI
    if _capturing(weight_OI):
        return weight_OI.detach().to(dtype)
    key = weight_OI._version, dtype, weight_OI.device
    if _last is None or _last.weight() is not weight_OI or _last.key != key:
        _last = None  # freed before the next is made
        _last = _Last(weakref.ref(weight_OI), key, weight_OI.detach().to(dtype))
    return _last.cast


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI, bias_O, product: Product | None):
        ctx.x_dtype, ctx.weight, ctx.dtype = x.dtype, weight_OI, _computed_in(x)
        ctx.save_for_backward(x if weight_OI.requires_grad else None, weight_OI)
        return _linear(x, weight_OI, bias_O, product)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors
        grad = grad.to(ctx.dtype)  # float32 where the product was wider than what it was made of
        grad_NO = grad.flatten(0, -2)
        if x is not None:
            _add_product(ctx.weight, grad_NO, x.to(grad.dtype).flatten(0, -2))
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        return (
            (grad @ _cast(ctx.weight, grad.dtype)).to(ctx.x_dtype) if needs_x else None,
            None,
            grad_NO.sum(0).float() if needs_bias else None,
            None,
        )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight_VH, padding_idx):
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight_VH, padding_idx
        return nn.functional.embedding(ids, weight_VH)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        ids_N, grad_NH = ctx.saved_tensors[0].flatten(), grad.flatten(0, -2)
        grad_NH = grad_NH.to(ctx.weight.dtype)
        if ctx.padding_idx is not None:
            grad_NH = grad_NH.masked_fill((ids_N == ctx.padding_idx)[:, None], 0.0)
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight)
        if grad_NH.device.type == "cpu":
            ctx.weight.grad.index_add_(0, ids_N, grad_NH)
        else:  # a GPU's index_add_ adds in another order each time; this sorts rows by their token first
            ctx.weight.grad.index_put_((ids_N,), grad_NH, accumulate=True)
        return None, None, None


def _add_product(weight_OI: torch.Tensor, grad_NO: torch.Tensor, x_NI: torch.Tensor) -> None:
    """weight.grad += grad^T x."""
    if grad_NO.dtype == weight_OI.dtype:
        if weight_OI.grad is None:
            weight_OI.grad = grad_NO.T @ x_NI
        else:
            weight_OI.grad.addmm_(grad_NO.T, x_NI)
        return
    if weight_OI.grad is None:
        weight_OI.grad = torch.zeros_like(weight_OI)
    for total_oI, grad_No in zip(weight_OI.grad.split(BLOCK), grad_NO.split(BLOCK, dim=1), strict=True):
        total_oI += grad_No.T @ x_NI
