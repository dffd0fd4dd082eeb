"""A device "cuda" on a machine without one, and a look over the shoulder of every operation on it.

Under torch's ``FakeTensorMode`` a tensor has a shape, a type and a device, and no numbers. So a model of any size costs
nothing, and an operation whose operands are on two devices raises, as does one that has to look at numbers: ``item``,
``tolist``, ``bool``, ``nonzero``, an index of booleans. On a GPU each of these makes the host wait. ``Watch`` refuses
what fake tensors alone would let pass: a copy to the host, and, while a CUDA graph is captured, any tensor that is not
on the device. It checks what torch's flash kernels demand of what they are given, and keeps a list of matrix products
and their types.

A build of torch without CUDA takes no backward pass on such tensors, because autograd asks the device for a guard. So
``guard.cpp`` has one, which is compiled in two seconds, once. Outside of ``fake_cuda`` nothing of it is left.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForCausalLM

SOURCE = Path(__file__).with_name("guard.cpp")
aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
FLASH = {aten._flash_attention_forward, aten._flash_attention_backward}


class WaitsForTheHost(AssertionError):
    """Numbers travelled from the device to the host, or, within a CUDA graph, the other way."""


class NotForThisKernel(AssertionError):
    """A kernel was given what it refuses on a GPU."""


class Watch(TorchDispatchMode):
    """Sees every operation within it. ``seen`` are their names; ``products`` the matrix products: operation,
    types given, type made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[str, tuple[torch.dtype, ...], torch.dtype]] = []
        self.seen: set[str] = set()
        self.capturing = False
        self.may_make_masks = False  # which costs one look at the device a forward pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_flatten(made)[0] if isinstance(x, torch.Tensor)]
        on_device = any(x.is_cuda for x in given)
        if on_device and any(x.device.type == "cpu" for x in outputs):
            raise WaitsForTheHost(f"{func} copies from the device to the host")
        if self.capturing and any(x.device.type == "cpu" for x in [*outputs, *(x for x in given if x.ndim)]):
            raise WaitsForTheHost(f"{func} reads the host's memory within a CUDA graph")
        self.seen.add(func.overloadpacket.__name__)
        if func.overloadpacket in FLASH:
            _check_flash(func, given)
        if func.overloadpacket in PRODUCTS and given[-1].shape[-2] > 1:  # of positions and frequencies: one by one
            self.products.append((func.overloadpacket.__name__, tuple(x.dtype for x in given), outputs[0].dtype))
        return made

    @contextmanager
    def graph(self) -> Iterator[None]:
        """Within it, a CUDA graph is captured."""
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def types_multiplied(self, *names: str) -> set[torch.dtype]:
        """Types of what was given to these products, or to all."""
        return {dtype for name, dtypes, _ in self.products if name in (names or (name,)) for dtype in dtypes}


class _Fake(FakeTensorMode):
    avoid_device_init = True  # it asks torch.cuda.is_available, which says yes here


def _check_flash(func: Any, given: list[torch.Tensor]) -> None:
    """What ``mha_varlen_fwd`` and ``mha_varlen_bwd`` of torch's flash_api.cpp refuse."""
    name = func.overloadpacket.__name__
    heads = [x for x in given if x.ndim == 3]  # (N,h,D) each
    bounds = [x for x in given if x.dtype == torch.int32]  # of queries, of keys, and how many keys count
    if wrong := {x.dtype for x in heads} - {torch.bfloat16, torch.float16} or len({x.dtype for x in heads}) > 1:
        raise NotForThisKernel(f"{name} takes bfloat16 or float16, all of one type: {wrong}")
    if any(x.stride(-1) != 1 or x.shape[-1] > 256 or x.shape[-1] % 8 for x in heads):
        raise NotForThisKernel(f"{name} takes heads of up to 256, a multiple of 8, each contiguous")
    if len(bounds) not in (2, 3) or not all(x.is_contiguous() and x.ndim == 1 and len(x) > 1 for x in bounds):
        raise NotForThisKernel(f"{name} needs lists of bounds in int32")


@cache
def _guard() -> ctypes.CDLL | None:
    """The compiled guard; None where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        return None
    home = Path(torch.__file__).parent
    of = SOURCE.read_bytes() + torch.__version__.encode() + str(home).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo"
    file = folder / f"fake_cuda-{hashlib.sha256(of).hexdigest()[:16]}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as built:
            flags = ["-std=c++20", "-fPIC", "-shared", f"-I{home}/include"]
            link = [f"-L{home}/lib", "-lc10", "-ltorch_cpu"]
            command = [compiler, *flags, str(SOURCE), *link, "-o", f"{built}/guard.so"]
            subprocess.run(command, check=True, capture_output=True)
            os.replace(f"{built}/guard.so", file)
    return ctypes.CDLL(str(file))


def can_fake() -> bool:
    return not torch.backends.cuda.is_built() and _guard() is not None


@contextmanager
def fake_cuda() -> Iterator[Watch]:
    """Within it, tensors on "cuda" can be made, and every tensor is fake."""
    guard = _guard()
    assert guard is not None
    watch, fake = Watch(), _Fake()
    torch.zeros(1, requires_grad=True).sum().backward()  # autograd counts devices once: here, where there is none
    with ExitStack() as stack:
        guard.install()
        stack.callback(guard.remove_again)
        # One thread for a backward pass, the caller's: there is none for the device.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        for name in ("is_available", "is_bf16_supported"):
            stack.enter_context(mock.patch(f"torch.cuda.{name}", mock.Mock(return_value=True)))
        capturing = mock.Mock(side_effect=lambda: watch.capturing)
        stack.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", capturing))
        # To make a mask, transformers reads from the device whether positions restart within a row. It spares fake
        # tensors that.
        spares = mock.Mock(side_effect=lambda *_: watch.capturing or watch.may_make_masks)
        stack.enter_context(mock.patch("transformers.masking_utils.is_tracing", spares))
        stack.enter_context(fake)
        stack.enter_context(watch)
        yield watch


def causal_lm(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model on "cuda", without weights. Call it within ``fake_cuda``."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
    model.tie_weights()
    return model
