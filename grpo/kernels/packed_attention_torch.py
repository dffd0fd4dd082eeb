"""The two parts of ``packed_attention`` on a CPU, whose flash kernel takes a padded batch and knows no ragged one.

What attends to itself (every prompt, every completion) is sorted by length and stands side by side with what is about
as long: a few calls of the kernel instead of one for every completion. A place behind a segment's end holds a copy of
its last token: causal attention keeps it from everything before it, and its own output and gradient are left out.
Completions over their prompt take a call a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

aten = torch.ops.aten

LIKE = 0.8  # segments stand beside others up to this much shorter


@dataclass(frozen=True)
class _SideBySide:
    """Buckets of S segments with L places each, one after the other; a place exists once for every kv head.

    ``entry_M`` says which of the (N x kv heads) entries of a packed tensor stands at each of the M places, ordered by
    bucket, segment, kv head, place; ``place_K`` where each entry stands; ``copies`` the places behind segments' ends.
    """

    buckets: list[tuple[int, int]]
    entry_M: torch.Tensor
    place_K: torch.Tensor
    copies: torch.Tensor

    def spread(self, x_NhD: torch.Tensor) -> list[torch.Tensor]:
        """(N, heads, ...) to a tensor (S x kv heads, heads of each, L, ...) a bucket."""
        return self.split(self.gather(x_NhD))

    def gather(self, x_NhD: torch.Tensor) -> torch.Tensor:
        N, h, *rest = x_NhD.shape
        kv_heads = len(self.place_K) // N
        return x_NhD.reshape(N * kv_heads, h // kv_heads, *rest).index_select(0, self.entry_M)

    def split(self, x_M: torch.Tensor) -> list[torch.Tensor]:
        kv_heads = len(self.entry_M) // sum(S * L for S, L in self.buckets)
        pieces = x_M.split([S * kv_heads * L for S, L in self.buckets])
        return [x.unflatten(0, (-1, L)).transpose(1, 2) for x, (_, L) in zip(pieces, self.buckets, strict=True)]

    def back(self, pieces: list[torch.Tensor], N: int) -> torch.Tensor:
        """Inverse of ``spread``."""
        x_M = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in pieces])
        return x_M.index_select(0, self.place_K).unflatten(0, (N, -1)).flatten(1, 2)


@lru_cache(maxsize=8)  # the same for every layer of a micro-batch
def _side_by_side(segments: tuple[int, ...], kv_heads: int) -> _SideBySide:
    lengths = [end - start for start, end in pairwise(segments)]
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    buckets: list[list[int]] = []
    for i in order:
        if not buckets or lengths[i] < LIKE * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(i)
    heads = torch.arange(kv_heads)
    entries, copies, place_NK = [], [], torch.empty((segments[-1], kv_heads), dtype=torch.long)
    M = 0
    for bucket in buckets:
        starts_S1 = torch.tensor([segments[i] for i in bucket])[:, None]
        lengths_S1 = torch.tensor([lengths[i] for i in bucket])[:, None]
        S, L = len(bucket), lengths[bucket[0]]
        token_SL = starts_S1 + torch.minimum(torch.arange(L), lengths_S1 - 1)
        exists_SL = torch.arange(L) < lengths_S1
        place_SKL = M + torch.arange(S * kv_heads * L).view(S, kv_heads, L)
        place_NK[token_SL[exists_SL]] = place_SKL.transpose(1, 2)[exists_SL]
        copies.append(place_SKL.transpose(1, 2)[~exists_SL].flatten())
        entries.append((token_SL[:, None] * kv_heads + heads[:, None]).flatten())
        M += S * kv_heads * L
    shapes = [(len(bucket), lengths[bucket[0]]) for bucket in buckets]
    return _SideBySide(shapes, torch.cat(entries), place_NK.flatten(), torch.cat(copies))


def own(q_NhD, k_NkD, v_NkD, segments: list[int], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every segment over itself, causally: output (N,h,D) and log-sum-exp (h,N) float32."""
    N, kv_heads = k_NkD.shape[:2]
    beside = _side_by_side(tuple(segments), kv_heads)
    outs, lses = [], []
    for q, k, v in zip(*map(beside.spread, (q_NhD, k_NkD, v_NkD)), strict=True):
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        outs.append(out)
        lses.append(lse)
    return beside.back(outs, N), beside.back(lses, N).T


def own_backward(grad_NhD, q_NhD, k_NkD, v_NkD, out_NhD, lse_hN, segments: list[int], scale: float):
    """Its share of the gradients of queries, keys and values, given output and log-sum-exp of the whole."""
    N, kv_heads = k_NkD.shape[:2]
    beside = _side_by_side(tuple(segments), kv_heads)
    # Without a gradient a copy adds nothing to those of the keys it sees.
    grads = beside.split(beside.gather(grad_NhD).index_fill_(0, beside.copies, 0.0))
    saved = map(beside.spread, (q_NhD, k_NkD, v_NkD, out_NhD, lse_hN.T))
    dqs, dks, dvs = [], [], []
    for grad, q, k, v, out, lse in zip(grads, *saved, strict=True):
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, True, scale=scale
        )
        dqs.append(dq)
        dks.append(dk.sum(1, keepdim=True))
        dvs.append(dv.sum(1, keepdim=True))
    return tuple(beside.back(pieces, N) for pieces in (dqs, dks, dvs))


def over_prompts(q_NhD, k_MkD, v_MkD, q_bounds: list[int], k_bounds: list[int], scale: float):
    """The queries between each two bounds over the keys between two: output (N,h,D), log-sum-exp (h,N) float32."""
    N, h, _ = q_NhD.shape
    out_NhD = torch.empty(q_NhD.shape, dtype=q_NhD.dtype)
    lse_hN = torch.empty((h, N))
    for queries, keys in _pairs(q_bounds, k_bounds):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *_by_kv_head(q_NhD[queries], k_MkD[keys], v_MkD[keys]), 0.0, False, scale=scale
        )
        out_NhD[queries] = out.flatten(0, 1).transpose(0, 1)
        lse_hN[:, queries] = lse.flatten(0, 1)
    return out_NhD, lse_hN


def over_prompts_backward(
    grad_NhD, q_NhD, k_MkD, v_MkD, out_NhD, lse_hN, q_bounds: list[int], k_bounds: list[int], scale: float
):
    """Its share of the gradients, likewise."""
    dq_NhD, dk_MkD, dv_MkD = (torch.zeros(x.shape, dtype=x.dtype) for x in (q_NhD, k_MkD, v_MkD))
    kv_heads = k_MkD.shape[1]
    for queries, keys in _pairs(q_bounds, k_bounds):
        q, k, v = _by_kv_head(q_NhD[queries], k_MkD[keys], v_MkD[keys])
        grad, out = (x[queries].transpose(0, 1).unflatten(0, (kv_heads, -1)) for x in (grad_NhD, out_NhD))
        lse = lse_hN[:, queries].unflatten(0, (kv_heads, -1))
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, scale=scale
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
