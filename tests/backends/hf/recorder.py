"""A recorder of torch's calls, which stands in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """As a CUDA graph: numbers and shapes are those of the capture, a replay reads and writes the same tensors, and
    a capture that waits for a tensor's value fails. Unlike one it computes while it captures; the first replay is
    that."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple, dict, Any]] = []
        self.replayed = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replayed += 1
        for func, args, kwargs, out in self.calls if self.replayed else []:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorders:
    """A ``Capture`` that keeps what it made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.made: list[Recorder] = []
        self.monkeypatch = monkeypatch

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        self.made.append(Recorder())
        with self.monkeypatch.context() as patch, self.made[-1]:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers asks
            compute()
        return self.made[-1].replay
