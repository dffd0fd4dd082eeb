"""Backward passes of linear layers and embeddings that add their weight's gradient to ``weight.grad`` themselves.

Autograd makes the gradient of a micro-batch beside the sum of those before it, and adds it in a pass of its own. With
tied weights the head's, V x H numbers, is made when the most is held and kept until the embedding's, as large and all
zeros but for the rows of a few hundred tokens, joins it at the end. Here the product is added as it is computed, and
only rows of tokens that were seen are touched. Gradients are the same, to rounding.

Not for what listens to gradients as autograd hands them over: DDP, FSDP.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import nn

BLOCK = 4096  # rows of a weight whose gradient is made at once where it has to be added in another type


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
    if not _learns(self.weight):
        return nn.Linear.forward(self, x)
    return _Linear.apply(x, self.weight, self.bias)


def _embedding_forward(self: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    # Rows come in any order; on an accelerator they would be added in another one each time.
    if not (_learns(self.weight) and self.weight.device.type == "cpu"):
        return nn.Embedding.forward(self, ids)
    return _Embedding.apply(ids, self.weight, self.padding_idx)


def _learns(weight: torch.Tensor) -> bool:
    """In this pass, and nothing waits for autograd to hand it the gradient."""
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf and not hooks


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI, bias_O):
        ctx.x_dtype, ctx.weight = x.dtype, weight_OI
        x_cast, weight_cast_OI = x, weight_OI
        if torch.is_autocast_enabled(x.device.type):
            # Not autocast's own cast: it would keep the copy for others, without its gradient.
            dtype = torch.get_autocast_dtype(x.device.type)
            x_cast, weight_cast_OI = x.to(dtype), weight_OI.to(dtype)
            bias_O = None if bias_O is None else bias_O.to(dtype)
        ctx.save_for_backward(x, weight_cast_OI)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x_cast, weight_cast_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight_OI = ctx.saved_tensors
        grad_NO = grad.flatten(0, -2)
        _add_product(ctx.weight, grad_NO, x.flatten(0, -2).to(grad.dtype))
        needs_x, _, needs_bias = ctx.needs_input_grad
        return (
            (grad @ weight_OI).to(ctx.x_dtype) if needs_x else None,
            None,
            grad_NO.sum(0).float() if needs_bias else None,
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
        if ctx.padding_idx is not None:
            seen_N = ids_N != ctx.padding_idx
            ids_N, grad_NH = ids_N[seen_N], grad_NH[seen_N]
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight)
        ctx.weight.grad.index_add_(0, ids_N, grad_NH.to(ctx.weight.dtype))
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
