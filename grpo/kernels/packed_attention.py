"""Causal attention over a packed row that holds a prompt once, for all of its completions.

A completion's token sees its prompt and its own past. Torch's flash kernels compute two parts: (a) every prompt and
every completion attends causally to itself; (b) the completions of a prompt, side by side, attend to all of the prompt.
Softmax over both is the two outputs weighted by their log-sum-exps. In the backward pass each part is given the
*merged* output and log-sum-exp, and its gradient is then exactly its share of the whole: P = exp(QK - lse) and
dS = P * (dP - rowsum(dO * O)) hold element by element (as in ring attention, arXiv:2310.01889). No mask, no padding,
and nothing of size N x N is ever kept. On a CPU the two parts are one compiled call (``packed_attention_compiled.py``).

transformers knows it as ``grpo_packed``. ``install`` gives it to one model. With a ``layout`` among the model's keyword
arguments, this attention runs. Without one, transformers' own ``sdpa`` does, mask included.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from grpo.kernels import packed_attention_compiled as compiled
from grpo.types import Layout

NAME, PADDED = "grpo_packed", "sdpa"
aten = torch.ops.aten
Saved = tuple[torch.Tensor, ...]  # gradient of the output, q, k, v, output, log-sum-exp
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Private functions of torch, for accelerators. They take ragged batches.
FLASH = ("_flash_attention_forward", "_flash_attention_backward")
# Features that other models ask of attention. None of them is supported here.
NOT_HERE = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped attention",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "cache": "a paged cache",
}


class CannotPack(Exception):
    """Why a model can't compute packed rows. It ends up as a line of the log; training goes on with padded rows."""


def install(causal_lm: Any, device: torch.device) -> str | None:
    """Give the model this attention. Returns why it can't be used on ``device``, or None; then nothing is changed."""
    implementation = getattr(causal_lm.config, "_attn_implementation", None)
    if implementation == NAME:  # a copy of a model that has it
        return None
    if implementation != PADDED:
        return f"its attention is {implementation}, not {PADDED}"
    if reason := _missing(causal_lm, device):
        return reason
    register()
    causal_lm.set_attn_implementation(NAME)
    return None if causal_lm.config._attn_implementation == NAME else "transformers cannot exchange its attention"


def register() -> None:
    """Tell transformers the name. Imported only here, so that a process can use the allocator without transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[PADDED])


def _missing(causal_lm: Any, device: torch.device) -> str | None:
    if device.type == "cpu":
        size = head_size(causal_lm.config.get_text_config(decoder=True))
        return compiled.why_not(size) if size else "its configuration does not say how large its heads are"
    missing = [name for name in FLASH if not hasattr(aten, name)]
    return f"this torch has no torch.ops.aten.{missing[0]}" if missing else None


def head_size(config: Any) -> int:
    """How many numbers a head's queries and keys have; 0 where layers differ in it (Gemma 4) or the configuration does
    not say."""
    try:
        if size := getattr(config, "qk_head_dim", None):  # of DeepSeek-V3, whose head_dim is of the rope alone
            return size
        if size := getattr(config, "head_dim", None):
            return size
    except Exception:  # transformers' own, of a setting that layers differ in
        return 0
    width, heads = (getattr(config, name, 0) for name in ("hidden_size", "num_attention_heads"))
    return width // heads if heads else 0


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

    Raises CannotPack if the model asks for a feature that is not supported here.
    """
    if layout is None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        padded = ALL_ATTENTION_FUNCTIONS[PADDED]
        return padded(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    asked = [what for name, what in NOT_HERE.items() if kwargs.get(name) is not None]
    asked += ["dropout in attention"] * (dropout > 0)
    asked += ["attention that is not causal"] * (not getattr(module, "is_causal", True) or "is_causal" in kwargs)
    asked += ["a mask of its own"] * (attention_mask is not None and attention_mask.shape != (1, 1, 0, 0))
    asked += ["values of a larger size than keys"] * (key.shape[-1] < value.shape[-1])
    if asked:
        raise CannotPack(f"it has {asked[0]}")
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as for scaled_dot_product_attention
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    size = value.shape[-1]
    if size < key.shape[-1]:  # DeepSeek-V3's: zeros behind them give zeros behind what attention gives
        value = torch.nn.functional.pad(value, (0, key.shape[-1] - size))
    if device != "cpu" and query.dtype == torch.float32:
        raise CannotPack("the flash kernels of a GPU take bfloat16 alone, and model.dtype is float32")
    if device == "cpu" and not compiled.takes(query, key, value):
        return _under_a_mask(query, key, value, layout, scaling)[..., :size], None
    out_NhD = _Attention.apply(*(x[0].transpose(0, 1) for x in (query, key, value)), layout, scaling)
    return out_NhD[None, ..., :size], None


def _under_a_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float | None
) -> torch.Tensor:
    """The definition, with an N x N mask: for the few tokens of ``packed_check`` on a CPU without a compiled call."""
    sees_NN = torch.zeros((query.shape[2],) * 2, dtype=torch.bool)
    for start, end in pairwise(layout.segments):
        sees_NN[start:end, start:end] = torch.ones((end - start,) * 2, dtype=torch.bool).tril()
    for (start, end), (first, last) in zip(pairwise(layout.segments), pairwise(layout.groups), strict=False):
        sees_NN[first:last, start:end] = True
    out = scaled_dot_product_attention(query, key, value, attn_mask=sees_NN, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


class _Attention(torch.autograd.Function):
    """(N,h,D), (N,kv,D), (N,kv,D) to (N,h,D). Kept for the backward pass: these four and one float a head and token."""

    @staticmethod
    def forward(ctx, q_NhD, k_NkD, v_NkD, layout: Layout, scale: float | None):
        scale = q_NhD.shape[-1] ** -0.5 if scale is None else scale
        ctx.layout, ctx.scale = layout, scale
        if q_NhD.device.type == "cpu":
            bounds = tuple(layout.segments), tuple(layout.groups)
            out_NhD, lse_hN = compiled.forward(q_NhD, k_NkD, v_NkD, *bounds, scale)
            ctx.save_for_backward(q_NhD, k_NkD, v_NkD, out_NhD, lse_hN)
            return out_NhD
        prompts = layout.groups[0]  # how many tokens are prompts; completions follow
        out_NhD, lse_hN = _own(q_NhD, k_NkD, v_NkD, layout, scale)
        if prompts < len(q_NhD):
            prefix, prefix_lse = _over_prompts(q_NhD[prompts:], k_NkD[:prompts], v_NkD[:prompts], layout, scale)
            lse = lse_hN[:, prompts:]
            share = torch.sigmoid(prefix_lse - lse).T[..., None]
            part = out_NhD[prompts:]
            part.copy_(part.float().lerp_(prefix.float(), share))
            lse.copy_(torch.logaddexp(lse, prefix_lse))
        ctx.save_for_backward(q_NhD, k_NkD, v_NkD, out_NhD, lse_hN)
        return out_NhD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NhD):
        q_NhD, k_NkD, v_NkD, out_NhD, lse_hN = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        if q_NhD.device.type == "cpu":
            bounds = tuple(layout.segments), tuple(layout.groups)
            return *compiled.backward(grad_NhD, q_NhD, k_NkD, v_NkD, out_NhD, lse_hN, *bounds, scale), None, None
        prompts = layout.groups[0]
        dq, dk, dv = _own_backward((grad_NhD, q_NhD, k_NkD, v_NkD, out_NhD, lse_hN), layout, scale)
        if prompts < len(q_NhD):
            queries, keys = slice(prompts, None), slice(prompts)
            part = grad_NhD, q_NhD, k_NkD, v_NkD, out_NhD
            grad, q, k, v, out = (x[p] for x, p in zip(part, (queries, queries, keys, keys, queries), strict=True))
            dq2, dk2, dv2 = _over_prompts_backward((grad, q, k, v, out, lse_hN[:, queries]), layout, scale)
            dq[queries] += dq2
            dk[keys] += dk2
            dv[keys] += dv2
        return dq, dk, dv, None, None


def _own(q_NhD, k_NkD, v_NkD, layout: Layout, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Part (a): output (N,h,D) and log-sum-exp (h,N) float32."""
    bounds, longest = layout.segments_on_device, _longest(layout.segments)
    return _flash(q_NhD, k_NkD, v_NkD, bounds, bounds, longest, longest, causal=True, scale=scale)


def _over_prompts(q_NhD, k_MkD, v_MkD, layout: Layout, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Part (b), the same; its queries are the completions' alone, its keys the prompts'."""
    return _flash(q_NhD, k_MkD, v_MkD, *_prompts_on_device(layout), causal=False, scale=scale)


def _own_backward(saved: Saved, layout: Layout, scale: float) -> Gradients:
    """Part (a)'s share of the gradients of queries, keys and values, given output and log-sum-exp of the whole."""
    bounds, longest = layout.segments_on_device, _longest(layout.segments)
    return _flash_backward(*saved, bounds, bounds, longest, longest, causal=True, scale=scale)


def _over_prompts_backward(saved: Saved, layout: Layout, scale: float) -> Gradients:
    """Part (b)'s share."""
    return _flash_backward(*saved, *_prompts_on_device(layout), causal=False, scale=scale)


def _prompt_bounds(layout: Layout) -> tuple[list[int], list[int]]:
    """Bounds of each prompt's completions, counted from the first completion, and of the prompts."""
    return [bound - layout.groups[0] for bound in layout.groups], layout.segments[: len(layout.groups)]


def _prompts_on_device(layout: Layout) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    q_bounds, k_bounds = _prompt_bounds(layout)
    on_device = layout.groups_on_device, layout.segments_on_device[: len(k_bounds)]
    return *on_device, _longest(q_bounds), _longest(k_bounds)


def _longest(bounds: list[int]) -> int:
    return max(end - start for start, end in pairwise(bounds))


# Called as torch.nn.attention.varlen does (torch 2.8 to 2.13). Not yet run: they were written where there was no GPU.


def _flash(q, k, v, cum_q, cum_k, longest_q: int, longest_k: int, *, causal: bool, scale: float):
    lengths = cum_q, cum_k, longest_q, longest_k
    return aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, scale=scale)[:2]


def _flash_backward(
    grad, q, k, v, out, lse, cum_q, cum_k, longest_q: int, longest_k: int, *, causal: bool, scale: float
):
    # Without dropout the state of the generator is not looked at.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    given = grad.contiguous(), q, k, v, out, lse.contiguous(), cum_q, cum_k, longest_q, longest_k
    return aten._flash_attention_backward(*given, 0.0, causal, state, unused, scale=scale)
