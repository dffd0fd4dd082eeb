"""Attention for decoding: every row's one query against its prompt's keys, held once, and its own.

Models reach it through transformers' attention interface, under a name of its own; without a transformers cache, since
the keys and values are in a ``DecodeCache``. The two parts are merged by their log-sum-exps, which is exact. Query
heads that share a key-value head, and rows that share a prompt, stand where query positions do: a key is read once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo.backends.hf.kv_cache import DecodeCache, Layer, LivePrompts, Step

NAME = "grpo_decode"
# What a kernel of ours computes just as these do, where a layer asks for nothing special.
PLAIN = frozenset({"sdpa", "grpo_packed", "flash_attention_2", "flash_attention_3"})
SPECIAL = ("sliding_window", "softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class _Routed:
    cache: DecodeCache
    implementation: str  # the model's own attention


_routed: ContextVar[_Routed] = ContextVar("routed")


@contextmanager
def decoding_into(model: PreTrainedModel, cache: DecodeCache) -> Iterator[None]:
    """Within it, the model's attention layers file into and read from ``cache``, and no other cache is needed."""
    implementation = model.config._attn_implementation
    token = _routed.set(_Routed(cache, implementation))
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        _routed.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """transformers' interface: query (B, heads, T, D), key and value (B, kv heads, T, D) to (B, T, heads, D)."""
    routed = _routed.get()
    if routed.cache.prefill is not None:
        routed.cache.file_away(module.layer_idx, key, value)
        return _own(routed, module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    layer, step = routed.cache.append(module.layer_idx, key, value), routed.cache.step
    assert step is not None
    if routed.implementation in PLAIN and not any(kwargs.get(name) for name in SPECIAL):
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        return decode_attention(query[:, :, 0], layer, step, scale)[:, None], None
    keys, values, mask = _spread(layer, step, kwargs.get("sliding_window"), query.dtype)
    return _own(routed, module)(module, query, keys, values, mask, scaling=scaling, **kwargs)


def _own(routed: _Routed, module: torch.nn.Module) -> Any:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(routed.implementation, eager)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """A prefill is masked as the model's own attention wants it; a decoding step masks by itself."""
    routed = _routed.get()
    if routed.cache.prefill is None:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[routed.implementation](*args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def decode_attention(query_BHD: torch.Tensor, layer: Layer, step: Step, scale: float) -> torch.Tensor:
    """Outputs (B, heads, D) of one query a row over its prompt and what it wrote."""
    B, heads, D = query_BHD.shape
    kv_heads = layer.row_keys.shape[1]
    grouped = query_BHD.reshape(B, kv_heads, heads // kv_heads, D)
    own, own_lse = _attend(
        grouped,
        layer.row_keys[:B, :, : step.row_tokens],
        layer.row_values[:B, :, : step.row_tokens],
        step.row_mask_BC,
        scale,
    )
    if step.prompts is not None:
        shared, shared_lse = _over_prompts(grouped, layer, step.prompts, scale)
        weight = torch.sigmoid(shared_lse - own_lse)[..., None]  # exp(l1) / (exp(l1) + exp(l2))
        own = torch.lerp(own.float(), shared.float(), weight).to(own.dtype)
    return own.reshape(B, heads, -1)


def _over_prompts(
    grouped: torch.Tensor, layer: Layer, prompts: LivePrompts, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and log-sum-exps (B, kv heads, queries) of ``grouped`` (B, kv heads, queries, D) over the prompts."""
    B, kv_heads, Q, D = grouped.shape
    U, n = prompts.number, prompts.group_size
    into, back = prompts.places_by_kv_head(kv_heads)
    out, lse = _attend(
        grouped.reshape(B * kv_heads, Q * D).index_select(0, into).view(U, kv_heads, n * Q, D),
        layer.prompt_keys[:U, :, : prompts.longest],
        layer.prompt_values[:U, :, : prompts.longest],
        prompts.mask_UP,
        scale,
    )
    by_row = out.reshape(U * kv_heads * n, -1).index_select(0, back)
    lse_by_row = lse.reshape(U * kv_heads * n, Q).index_select(0, back)
    return by_row.view(B, kv_heads, Q, -1), lse_by_row.view(B, kv_heads, Q)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask_NK: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of (N, kv heads, Q, D) over (N, kv heads, K, D), and its log-sum-exp in float32 (N, kv heads, Q)."""
    mask = None if mask_NK is None else mask_NK.to(query.dtype)[:, None, None, :]
    if query.device.type == "cpu" and value.shape[-1] == query.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse[..., None]).exp().to(value.dtype), value), lse


def _spread(
    layer: Layer, step: Step, sliding_window: int | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values (B, kv heads, P + C, D) of every row, prompt before its own, and the mask added to scores: what
    attention with a window, soft-capping or sinks wants, at the price of a copy."""
    B, C, prompts = len(step.rows_B), step.row_tokens, step.prompts
    keys, values = layer.row_keys[:B, :, :C], layer.row_values[:B, :, :C]
    at_B1, device = step.positions_B[:, None], keys.device
    positions_BK = torch.arange(C, device=device)[None].expand(B, C)
    exists_BK = positions_BK <= step.written_B[:, None]
    if prompts is not None:
        P = prompts.longest
        keys = torch.cat([layer.prompt_keys[prompts.of_B, :, :P], keys], dim=2)
        values = torch.cat([layer.prompt_values[prompts.of_B, :, :P], values], dim=2)
        in_prompt_BP = torch.arange(P, device=device)[None].expand(B, P)
        positions_BK = torch.cat([in_prompt_BP, prompts.lengths_B[:, None] + positions_BK], dim=1)
        exists_BK = torch.cat([in_prompt_BP < prompts.lengths_B[:, None], exists_BK], dim=1)
    if sliding_window:
        exists_BK = exists_BK & (positions_BK > at_B1 - sliding_window)
    mask = torch.zeros(exists_BK.shape, dtype=dtype, device=device).masked_fill_(~exists_BK, torch.finfo(dtype).min)
    return keys, values, mask[:, None, None, :]
