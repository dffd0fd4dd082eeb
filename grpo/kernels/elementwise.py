"""Norms and the product of gated MLPs on a CPU, forward and backward, each in one pass (``elementwise.cpp``).

torch reads and writes memory five times for a norm's forward pass and a dozen times for its backward pass. A model's
modules are matched by running them, not by class name. A module that computes something else, or is given another type,
layout or shape, goes through torch: compiled code would read beyond what it is given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from ctypes import CDLL, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from grpo.kernels import native

log = logging.getLogger("grpo")
SOURCE = Path(__file__).with_name("elementwise.cpp")
CLOSE = 1e-5  # tolerance against a module's own output; other formulas differ in the first digit


@lru_cache(maxsize=1)
def library() -> CDLL | None:
    """None where it can't be compiled; a line in the log then says why."""
    try:
        found = native.library(SOURCE)
    except native.CannotCompile as error:
        log.info("update: norms and gated MLPs through torch, slower: %s", error)
        return None
    norm = [c_void_p, c_void_p, c_float, c_int64, c_int32, c_void_p, c_int32]
    found.norm_float32.argtypes = norm
    found.norm_gradient_float32.argtypes = [c_void_p, *norm[:-1], c_void_p, c_int32]
    for function in (found.gated_float32, found.gated_bfloat16):
        function.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_int32]
    for function in (found.gated_gradient_float32, found.gated_gradient_bfloat16):
        function.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int32]
    return found


class Norm(NamedTuple):
    """x (..., H) and a weight (H,), float32, to x (mean(x^2) + eps)^-1/2 weight (arXiv:1910.07467)."""

    eps: float

    def takes(self, *inputs: torch.Tensor | None) -> bool:
        x, weight = inputs
        return _take(inputs, torch.float32) and x.shape[-1:] == weight.shape

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out, H = torch.empty_like(x), x.shape[-1]
        _run("norm_float32", x, weight, self.eps, x.numel() // H, H, out)
        return out

    def gradients(self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dx, H = torch.empty_like(x), x.shape[-1]
        dw_threads = torch.zeros((torch.get_num_threads(), H))
        _run("norm_gradient_float32", x, weight, grad.contiguous(), self.eps, x.numel() // H, H, dx, dw_threads)
        return dx, dw_threads.sum(0)


class Gated(NamedTuple):
    """gate and up, float32 or bfloat16, to silu(gate) up (arXiv:2002.05202)."""

    def takes(self, *inputs: torch.Tensor | None) -> bool:
        gate, up = inputs
        if gate is None or gate.dtype not in (torch.float32, torch.bfloat16):
            return False
        return _take(inputs, gate.dtype) and gate.shape == up.shape

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(gate)
        _run(f"gated_{_name(gate)}", gate, up, gate.numel(), out)
        return out

    def gradients(self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _run(f"gated_gradient_{_name(gate)}", gate, up, grad.contiguous(), gate.numel(), d_gate, d_up)
        return d_gate, d_up


def norm_of(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Norm | None:
    """The compiled form of ``forward(x, weight)``, if ``module`` is such a norm on a CPU."""
    eps, weight = getattr(module, "variance_epsilon", getattr(module, "eps", None)), getattr(module, "weight", None)
    if not isinstance(eps, float) or weight is None or list(module._parameters) != ["weight"]:
        return None
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.ndim != 1:
        return None
    if (compiled := library()) is None or len(weight) % compiled.vector_floats():
        return None
    x = torch.linspace(-2, 2, 2 * len(weight)).sin().view(2, -1)
    return _if_same(Norm(eps), forward, x, weight + torch.linspace(0, 1, len(weight)))


def gated_of(forward: Callable[..., torch.Tensor], device: torch.device) -> Gated | None:
    """The compiled form of ``forward(gate, up)``, if it is this product on a CPU."""
    if device.type != "cpu" or library() is None:
        return None
    gate = torch.linspace(-9, 9, 35)
    return _if_same(Gated(), forward, gate, gate.cos())


@torch.no_grad()
def _if_same(compiled, forward: Callable[..., torch.Tensor], *inputs: torch.Tensor):
    expected = forward(*inputs)
    same = expected.shape == inputs[0].shape and torch.allclose(compiled(*inputs), expected, rtol=CLOSE, atol=CLOSE)
    return compiled if same else None


def _take(inputs: tuple[torch.Tensor | None, ...], dtype: torch.dtype) -> bool:
    return all(
        x is not None and x.device.type == "cpu" and x.dtype == dtype and type(x) in (torch.Tensor, nn.Parameter)
        and x.is_contiguous()
        for x in inputs
    )  # fmt: skip


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _run(name: str, *arguments: torch.Tensor | float) -> None:
    values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
    getattr(library(), name)(*values, torch.get_num_threads())
