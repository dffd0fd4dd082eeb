"""Norms and the product of gated MLPs on a GPU, each one kernel forward and one or two backward: Liger's Triton kernels
(arXiv:2410.10989, the package ``liger-kernel``).

Liger's own way is to exchange a model's classes. Here its functions stand where ``elementwise.py``'s do on a CPU:
within ``lean_activations``, which keeps the inputs alone. (Liger keeps a norm's output in the layer that reads it, and
the product.) A module is given one where that gives the same as its own forward pass on the device, gradients too. Its
fused linear losses are not used: they take a hidden state and a weight to a loss of Liger's, and ours needs the
log-probabilities themselves, with entropies, truncation and losses of the user's own. ``model.logprobs`` does not keep
logits either.

Not yet run on a GPU. The tests run the kernels in Triton's interpreter, where triton and liger-kernel are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

DEVICES = {"cuda", "xpu"}
FORMS = (("llama", 0.0), ("gemma", 1.0))  # of norms: Liger's name of what is rounded when, and what the weight lacks
# Share of its size by which a result may differ from the module's own; bfloat16 rounds to 0.004.
CLOSE = {torch.float32: 1e-4}
CLOSE_BELOW_FLOAT32 = 0.02
NARROW = torch.bfloat16  # also compared in
ROWS = 16  # made up, to compare with


def why_not(device: torch.device) -> str | None:
    """Why Liger's kernels can't be used on ``device``, or None."""
    if device.type not in DEVICES:
        return f"Liger has kernels for GPUs, and this is a {device.type}"
    for package in ("triton", "liger_kernel"):
        if importlib.util.find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed (pip install 'grpo-train[gpu]')"
    try:
        _ops()
    except Exception as error:  # what it imports differs by version: triton, torch's private names
        return f"liger-kernel can't be imported ({type(error).__name__}: {error})"
    return None


class _Ops(NamedTuple):
    norm_forward: Callable[..., Any]
    norm_backward: Callable[..., Any]
    gated_forward: Callable[..., Any]
    gated_backward: Callable[..., Any]


@cache
def _ops() -> _Ops:
    norm, gated = (importlib.import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "swiglu"))
    return _Ops(norm.rms_norm_forward, norm.rms_norm_backward, gated.swiglu_forward, gated.swiglu_backward)


class Norm(NamedTuple):
    """x (..., H) and a weight (H,) to x (mean(x^2) + eps)^-1/2 (weight + offset) (arXiv:1910.07467)."""

    eps: float
    casting: str
    offset: float

    def takes(self, *inputs: torch.Tensor | None) -> bool:
        x, weight = inputs
        if x is None or weight is None or not _on_device(x, weight) or x.shape[-1:] != weight.shape:
            return False
        return torch.promote_types(x.dtype, weight.dtype) == x.dtype  # else the module's own result is wider than x

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._forward(x, weight)[0]

    def gradients(self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, rows, scale, *how, casting = self._forward(x, weight)
        given = grad.contiguous(), rows, weight, scale, self.offset, casting, *how
        return _ops().norm_backward(*given, False, None)  # not in place: others may read the gradient

    def _forward(self, x: torch.Tensor, weight: torch.Tensor) -> Any:
        return _ops().norm_forward(x.contiguous(), weight, self.eps, self.offset, self.casting, None)


class Gated(NamedTuple):
    """gate and up to silu(gate) up (arXiv:2002.05202)."""

    def takes(self, *inputs: torch.Tensor | None) -> bool:
        gate, up = inputs
        return gate is not None and up is not None and _on_device(gate, up) and _alike(gate, up)

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _ops().gated_forward(gate.contiguous(), up.contiguous())[2]

    def gradients(self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Liger overwrites gate and up. Whatever was made of them again has been read by now (lean_activations).
        d_gate, d_up = _ops().gated_backward(gate.contiguous(), up.contiguous(), grad.contiguous())
        return d_gate.view_as(gate), d_up.view_as(up)


def norm_of(module: nn.Module, forward: Callable[..., torch.Tensor], device: torch.device) -> Norm | None:
    """Liger's form of ``forward(x, weight)``, if ``module`` is such a norm: compared on ``device``, with its weight."""
    eps, weight = getattr(module, "variance_epsilon", getattr(module, "eps", None)), getattr(module, "weight", None)
    if not isinstance(eps, float) or weight is None or list(module._parameters) != ["weight"] or weight.ndim != 1:
        return None
    w = torch.linspace(-1, 1, len(weight)) if weight.is_meta else weight.detach().float().cpu()
    w = w + torch.linspace(0, 0.5, len(weight))  # no two are the same
    for casting, offset in FORMS:
        if _same(Norm(eps, casting, offset), forward, [_made_up(len(weight), 1), w], weight.dtype, device):
            return Norm(eps, casting, offset)
    return None


def gated_of(forward: Callable[..., torch.Tensor], device: torch.device) -> Gated | None:
    """Liger's form of ``forward(gate, up)``, if it is this product."""
    same = _same(Gated(), forward, [_made_up(128, 1), _made_up(128, 2)], torch.float32, device)
    return Gated() if same else None


def _same(form: Any, forward: Callable, inputs: list[torch.Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``form`` and ``forward`` give the same, and the same gradients, in ``dtype`` and in NARROW."""
    for wanted in dict.fromkeys((dtype, NARROW)):
        given = [x.to(device, wanted).requires_grad_() for x in inputs]
        with torch.enable_grad():
            own = forward(*given)
        if own.shape != given[0].shape or own.dtype != wanted:
            return False
        grad = _made_up(own.shape[-1], 3).to(own)
        expected = [own, *torch.autograd.grad(own, given, grad)]
        given = [x.detach() for x in given]
        with torch.no_grad():
            found = [form(*given), *form.gradients(grad, *given)]
        bound = CLOSE.get(wanted, CLOSE_BELOW_FLOAT32)
        for ours, theirs in zip(found, expected, strict=True):
            difference = (ours.float() - theirs.detach().float()).norm()
            if not float(difference) <= bound * float(theirs.detach().float().norm()):
                return False
    return True


def _made_up(width: int, phase: float) -> torch.Tensor:
    return (torch.linspace(-3, 3, ROWS * width) * 977 + phase).sin().view(ROWS, width) * 3


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape


def _on_device(*tensors: torch.Tensor) -> bool:
    """A kernel that is compiled at its first call can't be compiled within a CUDA graph: there, torch computes."""
    if any(x.device.type not in DEVICES or type(x) not in (torch.Tensor, nn.Parameter) for x in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
