"""Causal attention over a packed row in which completions of a prompt share it: the prompt is there once.

A completion's token sees its prompt and its own past. That is two parts, each a call of torch's flash kernel: (a) every
prompt and every completion attends causally to itself; (b) the completions of a prompt, side by side, attend to all of
the prompt. Softmax over both is the two outputs weighted by their log-sum-exps. In the backward pass each part is given
the *merged* output and log-sum-exp, and its gradient is then exactly its share of the whole: P = exp(QK - lse) and
dS = P * (dP - rowsum(dO * O)) hold element by element (as in ring attention, arXiv:2310.01889). No mask, no padding,
and nothing of size N x N is ever kept.

``sdpa`` is registered anew with transformers: with a ``layout`` among a model's keyword arguments it is what is here,
without one it is transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from grpo.types import Layout

aten = torch.ops.aten

# What other models ask of attention; none of it is here.
NOT_HERE = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped attention",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "cache": "a paged cache",
}


class CannotPack(Exception):
    """Why a model can't compute packed rows: ends up in one line of the log, never before a user's eyes as an error."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' interface: query (1, h, N, D), key and value (1, kv heads, N, D) to (1, N, h, D).

    Raises CannotPack where the model asks for what is not here.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    asked = [what for name, what in NOT_HERE.items() if kwargs.get(name) is not None]
    asked += ["dropout in attention"] * (dropout > 0)
    asked += ["attention that is not causal"] * (not getattr(module, "is_causal", True) or "is_causal" in kwargs)
    asked += ["values of another size than keys"] * (key.shape[-1] != value.shape[-1])
    if asked:
        raise CannotPack(f"it has {asked[0]}")
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as for scaled_dot_product_attention
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if device != "cpu" and query.dtype == torch.float32:
        raise CannotPack("the flash kernels of a GPU take bfloat16 alone, and model.dtype is float32")
    out_NhD = _Attention.apply(*(x[0].transpose(0, 1) for x in (query, key, value)), layout, scaling)
    return out_NhD[None], None


class _Attention(torch.autograd.Function):
    """(N,h,D), (N,kv,D), (N,kv,D) to (N,h,D). Kept for the backward pass: these four and one float a head and token."""

    @staticmethod
    def forward(ctx, q_NhD, k_NkD, v_NkD, layout: Layout, scale: float | None):
        scale = q_NhD.shape[-1] ** -0.5 if scale is None else scale
        prompts = layout.groups[0]  # how many tokens are prompts; completions follow
        out_NhD, lse_hN = _attend(q_NhD, k_NkD, v_NkD, *_own(layout), scale)
        if prompts < len(q_NhD):
            prefix, prefix_lse = _attend(q_NhD[prompts:], k_NkD[:prompts], v_NkD[:prompts], *_prefix(layout), scale)
            lse = lse_hN[:, prompts:]
            share = torch.sigmoid(prefix_lse - lse).T[..., None]
            part = out_NhD[prompts:]
            part.copy_(part.float().lerp_(prefix.float(), share))
            lse.copy_(torch.logaddexp(lse, prefix_lse))
        ctx.save_for_backward(q_NhD, k_NkD, v_NkD, out_NhD, lse_hN)
        ctx.layout, ctx.scale = layout, scale
        return out_NhD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NhD):
        q_NhD, k_NkD, v_NkD, out_NhD, lse_hN = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        prompts = layout.groups[0]
        dq, dk, dv = _attend_backward(grad_NhD, q_NhD, k_NkD, v_NkD, out_NhD, lse_hN, *_own(layout), scale)
        if prompts < len(q_NhD):
            queries, keys = slice(prompts, None), slice(prompts)
            saved = q_NhD[queries], k_NkD[keys], v_NkD[keys], out_NhD[queries], lse_hN[:, queries]
            dq2, dk2, dv2 = _attend_backward(grad_NhD[queries], *saved, *_prefix(layout), scale)
            dq[queries] += dq2
            dk[keys] += dk2
            dv[keys] += dv2
        return dq, dk, dv, None, None


# A part: the bounds of its queries, those of the keys that they see, the same as tensors, and whether it is causal.
Part = tuple[list[int], list[int], torch.Tensor, torch.Tensor, bool]


def _own(layout: Layout) -> Part:
    return layout.segments, layout.segments, layout.segments_on_device, layout.segments_on_device, True


def _prefix(layout: Layout) -> Part:
    prompts = len(layout.groups)
    queries = [bound - layout.groups[0] for bound in layout.groups]
    on_device = layout.groups_on_device, layout.segments_on_device[:prompts]
    return queries, layout.segments[:prompts], *on_device, False


def _attend(q_NhD, k_MkD, v_MkD, q_bounds, k_bounds, cum_q, cum_k, causal, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (N,h,D) and log-sum-exp (h,N) float32 of one part, in which every query has a key."""
    if q_NhD.device.type != "cpu":
        # As torch.nn.attention.varlen calls it (torch 2.8 to 2.13). Not yet run: written where there was no GPU.
        longest = _longest(q_bounds), _longest(k_bounds)
        return aten._flash_attention_forward(
            q_NhD, k_MkD, v_MkD, cum_q, cum_k, *longest, 0.0, causal, False, scale=scale
        )[:2]
    N, h, _ = q_NhD.shape
    out_NhD = torch.empty(q_NhD.shape, dtype=q_NhD.dtype)
    lse_hN = torch.empty((h, N))
    for queries, keys in _pairs(q_bounds, k_bounds):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *_by_kv_head(q_NhD[queries], k_MkD[keys], v_MkD[keys]), 0.0, causal, scale=scale
        )
        out_NhD[queries] = out.flatten(0, 1).transpose(0, 1)
        lse_hN[:, queries] = lse.flatten(0, 1)
    return out_NhD, lse_hN


def _attend_backward(
    grad_NhD, q_NhD, k_MkD, v_MkD, out_NhD, lse_hN, q_bounds, k_bounds, cum_q, cum_k, causal, scale
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one part's queries, keys and values, given output and log-sum-exp of the whole."""
    if q_NhD.device.type != "cpu":
        # As torch.nn.attention.varlen calls it; without dropout the state of the generator is not looked at.
        longest = _longest(q_bounds), _longest(k_bounds)
        state = torch.zeros(2, dtype=torch.uint64, device=q_NhD.device)
        unused = torch.empty(0, device=q_NhD.device)
        given = grad_NhD.contiguous(), q_NhD, k_MkD, v_MkD, out_NhD, lse_hN.contiguous(), cum_q, cum_k
        return aten._flash_attention_backward(*given, *longest, 0.0, causal, state, unused, scale=scale)
    dq_NhD, dk_MkD, dv_MkD = (torch.zeros(x.shape, dtype=x.dtype) for x in (q_NhD, k_MkD, v_MkD))
    kv_heads = k_MkD.shape[1]
    for queries, keys in _pairs(q_bounds, k_bounds):
        q, k, v = _by_kv_head(q_NhD[queries], k_MkD[keys], v_MkD[keys])
        grad, out = (x[queries].transpose(0, 1).unflatten(0, (kv_heads, -1)) for x in (grad_NhD, out_NhD))
        lse = lse_hN[:, queries].unflatten(0, (kv_heads, -1))
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        dq_NhD[queries] = dq.flatten(0, 1).transpose(0, 1)
        dk_MkD[keys] = dk.sum(1).transpose(0, 1)
        dv_MkD[keys] = dv.sum(1).transpose(0, 1)
    return dq_NhD, dk_MkD, dv_MkD


def _by_kv_head(q_nhD, k_mkD, v_mkD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(kv heads, query heads of each, tokens, D): keys and values are repeated by a stride of 0, not copied."""
    kv_heads = k_mkD.shape[1]
    q = q_nhD.transpose(0, 1).unflatten(0, (kv_heads, -1))
    return q, *(x.transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for x in (k_mkD, v_mkD))


def _pairs(q_bounds: list[int], k_bounds: list[int]) -> Iterator[tuple[slice, slice]]:
    """The slices that attend to each other; the CPU's kernel divides by zero where one is empty."""
    for (q_start, q_end), (k_start, k_end) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        if q_start < q_end and k_start < k_end:
            yield slice(q_start, q_end), slice(k_start, k_end)


def _longest(bounds: list[int]) -> int:
    return max(end - start for start, end in pairwise(bounds))


AttentionInterface.register("sdpa", attention)
