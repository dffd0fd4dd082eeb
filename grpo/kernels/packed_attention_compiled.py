"""``packed_attention`` on a CPU: both of its parts in one compiled call (``packed_attention.cpp``).

Without a compiler the update uses padded rows.
"""

from __future__ import annotations

import ctypes
from ctypes import CDLL, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from grpo.kernels import native

SOURCE = Path(__file__).with_name("packed_attention.cpp")
OF_TASKS = ("start", "length", "prompt", "prompt_length")


class _Array(Structure):
    _fields_ = [("at", c_void_p), ("token", c_int64), ("head", c_int64)]

    @classmethod
    def of(cls, x_NhD: torch.Tensor) -> _Array:
        return cls(x_NhD.data_ptr(), *x_NhD.stride()[:2])


class _Problem(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("kv_heads", "queries", "D", "tasks", "prompt_tokens")),
        ("scale", c_float),
        *((name, c_int64) for name in ("N", "keys")),
        *((name, c_void_p) for name in OF_TASKS),
        *((name, _Array) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        *((name, c_void_p) for name in ("lse", "work", "partial")),
    ]


@cache
def library() -> CDLL:
    """Raises native.CannotCompile."""
    found = native.library(SOURCE)
    found.work_floats.argtypes, found.work_floats.restype = [c_int64, c_int32], c_int64
    return found


def why_not(head_size: int) -> str | None:
    """Why heads of this size can't be computed, or None."""
    try:
        panel = library().panel()
    except native.CannotCompile as reason:
        return f"packed rows on a CPU are compiled code: {reason}"
    return f"its heads have {head_size} numbers, not a multiple of {panel}" if head_size % panel else None


def takes(*tensors: torch.Tensor) -> bool:
    """Whether queries, keys and values are of a kind that is compiled."""
    return why_not(tensors[0].shape[-1]) is None and all(
        x.device.type == "cpu"
        and x.dtype == tensors[0].dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.stride(-1) == 1
        for x in tensors
    )


def forward(q_NhD, k_NkD, v_NkD, segments: tuple[int, ...], groups: tuple[int, ...], scale: float):
    """Output (N,h,D) and log-sum-exp (h,N) float32. ``segments`` and ``groups`` are a Layout's."""
    out_NhD = torch.empty(q_NhD.shape, dtype=q_NhD.dtype)
    lse_hN = torch.empty((q_NhD.shape[1], len(q_NhD)))
    _attend(segments, groups, scale, lse_hN, q=q_NhD, k=k_NkD, v=v_NkD, out=out_NhD)
    return out_NhD, lse_hN


def backward(
    grad_NhD, q_NhD, k_NkD, v_NkD, out_NhD, lse_hN, segments: tuple[int, ...], groups: tuple[int, ...], scale: float
):
    """Gradients of queries, keys and values."""
    if grad_NhD.stride(-1) != 1:
        grad_NhD = grad_NhD.contiguous()
    dq_NhD, dk_NkD, dv_NkD = (torch.empty(x.shape, dtype=x.dtype) for x in (q_NhD, k_NkD, v_NkD))
    given = {"q": q_NhD, "k": k_NkD, "v": v_NkD, "out": out_NhD, "grad": grad_NhD}
    _attend(segments, groups, scale, lse_hN, **given, dq=dq_NhD, dk=dk_NkD, dv=dv_NkD)
    return dq_NhD, dk_NkD, dv_NkD


def _attend(segments: tuple[int, ...], groups: tuple[int, ...], scale: float, lse_hN, **arrays: torch.Tensor) -> None:
    compiled, threads = library(), torch.get_num_threads()
    N, h, D = arrays["q"].shape
    kv_heads, prompt_tokens = arrays["k"].shape[1], groups[0]
    tasks_4S, keys = _tasks(segments, groups, compiled.panel())
    work = torch.empty(threads * compiled.work_floats(keys, D))
    partial = torch.zeros(threads * 2 * prompt_tokens * kv_heads * D if "dq" in arrays else 0)
    problem = _Problem(
        kv_heads=kv_heads,
        queries=h // kv_heads,
        D=D,
        tasks=tasks_4S.shape[1],
        prompt_tokens=prompt_tokens,
        scale=scale,
        N=N,
        keys=keys,
        **{name: row.ctypes.data for name, row in zip(OF_TASKS, tasks_4S, strict=True)},
        **{name: _Array.of(x) for name, x in arrays.items()},
        lse=lse_hN.data_ptr(),
        work=work.data_ptr(),
        partial=partial.data_ptr(),
    )
    in_bfloat16, backwards = arrays["q"].dtype == torch.bfloat16, "dq" in arrays
    compiled.attend(ctypes.byref(problem), in_bfloat16, backwards, threads)


@lru_cache(maxsize=8)  # the same for every layer of a micro-batch
def _tasks(segments: tuple[int, ...], groups: tuple[int, ...], panel: int) -> tuple[np.ndarray, int]:
    """Start and length of each segment and of its prompt, prompts before their completions; and the most columns."""
    prompts = list(pairwise(segments[: len(groups)]))
    found, keys = [], 0
    for (start, end), (first, last) in zip(prompts, pairwise(groups), strict=True):
        found.append((start, end - start, start, 0))
        completions = [(a, b) for a, b in pairwise(segments[len(prompts) :]) if first <= a and b <= last and a < b]
        found += [(a, b - a, start, end - start) for a, b in completions]
        longest = max((b - a for a, b in [(start, end), *completions]), default=0)
        keys = max(keys, -(-(end - start) // panel) * panel + -(-longest // panel) * panel)
    return np.array(found, dtype=np.int64).T.copy(), keys
