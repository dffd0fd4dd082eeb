"""Attention for decoding: the one query of each sequence against the keys of its prompt and of its completion, and the
several queries of one that an environment has answered (``extension.py``).

Models call it through transformers' attention interface, where it is registered by a name of its own. Keys and values
are in a ``DecodeCache``, so transformers' cache is not used. Prompt and completion are attended to apart and merged by
their log-sum-exps, which is exact. A key is read once for all query heads that share its head, and a prompt's once for
all of its sequences: they stand side by side where a query's positions usually do.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo.backends.hf import flash
from grpo.backends.hf.buffers import Layer
from grpo.backends.hf.kv_cache import DecodeCache
from grpo.backends.hf.step import Extension, PromptGroups, Step
from grpo.errors import RunError, UserError

log = logging.getLogger("grpo")

NAME = "grpo_decode"
# ``decode_attention`` computes the same as these, unless a layer asks for something SPECIAL.
PLAIN = frozenset({"sdpa", "grpo_packed", "flash_attention_2", "flash_attention_3"})
SPECIAL = ("sliding_window", "softcap", "s_aux", "position_bias")
FLASH_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"  # a private operation of torch's: it may be gone


@dataclass(frozen=True)
class _Routed:
    cache: DecodeCache
    implementation: str  # the model's own attention


_routed: ContextVar[_Routed] = ContextVar("routed")


def implementation_of(model: PreTrainedModel) -> str:
    """The name of the model's attention in transformers' interface.

    Raises:
        UserError: the installed transformers does not tell it. Without it a model can't be given its attention back.
    """
    name = getattr(model.config, "_attn_implementation", None)
    if name is None:
        raise UserError(
            f"rollout.backend: hf needs to know the attention of {type(model).__name__}, and transformers "
            f"{transformers.__version__} does not tell it (config._attn_implementation); use rollout.backend: vllm or "
            "the transformers of constraints.txt"
        )
    return name


@contextmanager
def decoding_into(model: PreTrainedModel, cache: DecodeCache) -> Iterator[None]:
    """Within it, the model's attention layers write to ``cache`` and read from it."""
    implementation = implementation_of(model)
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
    routed, index = _routed.get(), int(module.layer_idx)  # type: ignore[arg-type]  # every layer of transformers has it
    if routed.cache.prefill is not None:
        routed.cache.file_away(index, key, value)
        return _own(routed, module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is not None and attention_mask.shape != (1, 1, 0, 0):  # LogprobLM.no_mask's
        raise RunError(f"{type(module).__name__} makes masks of its own")
    special = _chunk_of(module) or any(kwargs.get(name) is not None for name in SPECIAL)
    plain = routed.implementation in PLAIN and not special
    step = routed.cache.extension or routed.cache.step
    assert step is not None
    layer = routed.cache.append(index, key, value)
    if plain:
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        if isinstance(step, Step):
            return decode_attention(query[:, :, 0], layer, step, scale)[:, None], None
        return extension_attention(query, layer, step, scale), None
    keys, values, mask = _spread(layer, step, kwargs.get("sliding_window"), _chunk_of(module), query.dtype)
    return _own(routed, module)(module, query, keys, values, mask, scaling=scaling, **kwargs)


def _chunk_of(module: torch.nn.Module) -> int | None:
    """Of a layer that attends within chunks of the row (Llama 4's), which only masks tell: the chunk's tokens."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds[int(module.layer_idx)] != "chunked_attention":  # type: ignore[arg-type]
        return None
    return config.attention_chunk_size


def _own(routed: _Routed, module: torch.nn.Module) -> Any:
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(routed.implementation, eager)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """A prefill gets the mask of the model's own attention. A decoding step has its own (``Step``)."""
    routed = _routed.get()
    if routed.cache.prefill is None:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[routed.implementation](*args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def decode_attention(query_BHD: torch.Tensor, layer: Layer, step: Step, scale: float) -> torch.Tensor:
    """Outputs (B, heads, D) of one query (heads, D) a sequence over its prompt and its completion."""
    B, heads, D = query_BHD.shape
    kv_heads = layer.sequence_keys.shape[1]
    grouped = query_BHD.reshape(B, kv_heads, heads // kv_heads, D)
    if step.lengths is not None:
        own, own_lse = flash.attend(grouped, layer.sequence_keys, layer.sequence_values, step.lengths, scale)
    else:
        C = step.sequence_tokens
        keys, values = layer.sequence_keys[:B, :, :C], layer.sequence_values[:B, :, :C]
        own, own_lse = _attend(grouped, keys, values, step.mask_BC, scale)
    return _with_prompts(own, own_lse, grouped, layer, step.prompts, scale).reshape(B, heads, -1)


def extension_attention(query: torch.Tensor, layer: Layer, new: Extension, scale: float) -> torch.Tensor:
    """Outputs (B, T, heads, D) of several queries (B, heads, T, D) a sequence, each over its prompt and over the
    tokens of its completion up to its own."""
    B, heads, T, D = query.shape
    kv_heads, C = layer.sequence_keys.shape[1], new.sequence_tokens
    keys, values = (buffer[new.rows, :, :C].to(query.dtype) for buffer in (layer.sequence_keys, layer.sequence_values))
    grouped = query.reshape(B, kv_heads, heads // kv_heads * T, D)
    own, own_lse = _attend(grouped, keys, values, new.mask_BTC.repeat(1, heads // kv_heads, 1), scale)
    out = _with_prompts(own, own_lse, grouped, layer, new.prompts, scale)
    return out.reshape(B, heads, T, -1).transpose(1, 2)


def _with_prompts(
    own: torch.Tensor,
    own_lse: torch.Tensor,
    grouped: torch.Tensor,
    layer: Layer,
    prompts: PromptGroups | None,
    scale: float,
) -> torch.Tensor:
    """Outputs ``own`` (B, kv heads, queries, D) over completions, whose log-sum-exps are ``own_lse`` (B, kv heads,
    queries), merged with those of the same queries, ``grouped``, over the prompts."""
    if prompts is None:
        return own
    shared, shared_lse = _over_prompts(grouped, layer, prompts, scale)
    weight = torch.sigmoid(shared_lse - own_lse)[..., None]  # exp(l1) / (exp(l1) + exp(l2))
    return torch.lerp(own.float(), shared.float(), weight).to(own.dtype)


def _over_prompts(
    grouped: torch.Tensor, layer: Layer, prompts: PromptGroups, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and log-sum-exps (B, kv heads, queries) of ``grouped`` (B, kv heads, queries, D) over the prompts."""
    B, kv_heads, Q, D = grouped.shape
    U, n = prompts.number, prompts.group_size
    into, back = prompts.by_kv_head(kv_heads)
    queries = grouped.reshape(B * kv_heads, Q * D).index_select(0, into).view(U, kv_heads, n * Q, D)
    if prompts.lengths is not None:
        out, lse = flash.attend(queries, layer.prompt_keys, layer.prompt_values, prompts.lengths, scale)
    else:
        keys, values = layer.prompt_keys[:U, :, : prompts.longest], layer.prompt_values[:U, :, : prompts.longest]
        out, lse = _attend(queries, keys, values, prompts.mask_UP, scale)
    by_sequence = out.reshape(U * kv_heads * n, -1).index_select(0, back)
    lse_by_sequence = lse.reshape(U * kv_heads * n, Q).index_select(0, back)
    return by_sequence.view(B, kv_heads, Q, -1), lse_by_sequence.view(B, kv_heads, Q)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of (N, kv heads, Q, D) over (N, kv heads, K, D), and its log-sum-exp in float32 (N, kv heads, Q). The
    mask is (N,K), or (N,Q,K)."""
    if mask is not None:
        mask = mask.to(query.dtype).view(len(mask), 1, -1, mask.shape[-1])
    fused = _flash_on_cpu() if query.device.type == "cpu" else None
    if fused is not None and value.shape[-1] == query.shape[-1]:
        return fused(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse[..., None]).exp().to(value.dtype), value), lse


@cache
def _flash_on_cpu() -> Any:
    """torch's fused attention for CPUs, the only one that returns log-sum-exps; None where this torch has none."""
    fused = getattr(torch.ops.aten, FLASH_ON_CPU, None)
    if fused is None:
        log.warning("decoding: torch %s has no %s; attention is slower without", torch.__version__, FLASH_ON_CPU)
    return fused


def _spread(
    layer: Layer, step: Step | Extension, sliding_window: int | None, chunk: int | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values (B, kv heads, P + C, D) of prompt and completion together, and the mask (B, 1, T, P + C) to add
    to the scores of T new tokens, which is 1 in a decoding step.

    This is a copy. The model's own attention needs it, where that has a window, chunks, soft-capping or sinks.
    """
    B, C, prompts = len(step.written_BT), step.sequence_tokens, step.prompts
    keys, values = layer.sequence_keys[step.rows, :, :C], layer.sequence_values[step.rows, :, :C]
    at_BT1, device = step.positions_BT[..., None], keys.device
    positions_BK = torch.arange(C, device=device)[None].expand(B, C)
    exists_BTK = positions_BK[:, None] <= step.written_BT[..., None]
    if prompts is not None:
        P, T = prompts.longest, exists_BTK.shape[1]
        keys = torch.cat([layer.prompt_keys[prompts.prompt_B, :, :P], keys], dim=2)
        values = torch.cat([layer.prompt_values[prompts.prompt_B, :, :P], values], dim=2)
        in_prompt_BP = torch.arange(P, device=device)[None].expand(B, P)
        positions_BK = torch.cat([in_prompt_BP, prompts.lengths_B[:, None] + positions_BK], dim=1)
        in_prompt_BTP = (in_prompt_BP < prompts.lengths_B[:, None])[:, None].expand(B, T, P)
        exists_BTK = torch.cat([in_prompt_BTP, exists_BTK], dim=2)
    if sliding_window:
        exists_BTK = exists_BTK & (positions_BK[:, None] > at_BT1 - sliding_window)
    if chunk:
        exists_BTK = exists_BTK & (positions_BK[:, None] // chunk == at_BT1 // chunk)
    mask = torch.zeros(exists_BTK.shape, dtype=dtype, device=device).masked_fill_(~exists_BTK, torch.finfo(dtype).min)
    return keys, values, mask[:, None]
