"""``model.dtype: auto``: read from what a device says of itself."""

from __future__ import annotations

import builtins
import io
from typing import Any

import pytest
import torch

from grpo.model.devices import compute_dtype, has_bfloat16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True}, False),
        ({}, False),
    ],
)
def test_a_cpu(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], has: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(CPU) == has
    assert compute_dtype("auto", CPU) == (torch.bfloat16 if has else torch.float32)
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16
    assert compute_dtype("float32", CPU) == torch.float32


@pytest.mark.parametrize(
    ("flags", "has"), [("flags\t\t: fpu avx512f avx512_bf16", True), ("flags\t\t: fpu avx2", False), ("", False)]
)
def test_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, flags: str, has: bool) -> None:
    """torch 2.8 and 2.9."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(builtins, "open", lambda *_, **__: io.StringIO(flags + "\n"))
    assert has_bfloat16(CPU) == has


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """A GPU that emulates it has no instructions for it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert compute_dtype("auto", CUDA) == (torch.bfloat16 if native else torch.float32)


def test_a_device_that_does_not_tell() -> None:
    assert compute_dtype("auto", torch.device("meta")) == torch.float32
