"""Decoding attention by torch's flash kernel for ragged batches: it reads each row's keys up to the row's own length.

Rows are running sequences, or prompts. A batch entry of the kernel is one key head of one row, and the entry's queries
are the query heads that share the key head. So the kernel reads the cache's buffers where they stand, and a key is read
once for all query heads that share it.

The kernel is for GPUs, and was not run on one yet: the tests put a plain attention in its place on a CPU. At start the
backend compares the engine's logits with the model's own (``check.py``), and does without this where they differ.
"""

from __future__ import annotations

from typing import Any

import torch

# A private function of torch, called as torch.nn.attention.varlen does (torch 2.8 to 2.13).
KERNEL = "_flash_attention_forward"
LARGEST_HEAD = 256


class Lengths:
    """How many tokens each row holds (N,), and what the kernel wants to know of them, made once for all layers."""

    def __init__(self, lengths_N: torch.Tensor):
        self.lengths_N = lengths_N
        self._made: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def entries(self, kv_heads: int, queries: int, room: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each batch entry, in int32: where its queries and its keys begin (N * kv heads + 1), and how many keys
        count (N * kv heads). ``room`` is the tokens that the buffer has for a row."""
        asked = kv_heads, queries, room
        if asked not in self._made:
            N = len(self.lengths_N)
            places = torch.arange(N * kv_heads + 1, dtype=torch.int32, device=self.lengths_N.device)
            used = self.lengths_N.int()[:, None].expand(N, kv_heads).reshape(-1)
            self._made[asked] = places * queries, places * room, used
        return self._made[asked]


def why_not(causal_lm: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel can't serve a model whose keys are of ``dtype``, or None if it can."""
    config = causal_lm.config.get_text_config(decoder=True)
    windows = {kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"}
    if device.type != "cuda":
        return f"there is none for {device.type}"
    if not hasattr(torch.ops.aten, KERNEL):
        return f"this torch has no torch.ops.aten.{KERNEL}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "it takes 16-bit numbers alone"
    if windows or getattr(config, "sliding_window", None) or getattr(config, "attn_logit_softcapping", None):
        return "some layers have a window or soft-capping"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head > LARGEST_HEAD or head % 8:
        return f"it takes heads of up to {LARGEST_HEAD} numbers, in multiples of 8, and this model's are {head}"
    return None


def kernel() -> Any:
    return getattr(torch.ops.aten, KERNEL)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: Lengths, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of (N, kv heads, Q, D) over the first tokens of (at least N, kv heads, room, D), and its log-sum-exp in
    float32 (N, kv heads, Q). Every row must hold a token."""
    N, kv_heads, Q, D = query.shape
    room = keys.shape[2]
    q_bounds, k_bounds, used = lengths.entries(kv_heads, Q, room)
    out, lse = kernel()(
        query.to(keys.dtype).reshape(-1, 1, D),
        keys[:N].view(-1, 1, D),
        values[:N].view(-1, 1, D),
        q_bounds,
        k_bounds,
        Q,
        room,
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=used,
    )[:2]
    return out.view(N, kv_heads, Q, D).to(query.dtype), lse.view(N, kv_heads, Q)
