"""The machine's measured limits: bytes moved and floating-point operations a second.

    python -m benchmarks.gpu.machine [--device cpu]

The other parts of ``gpu_suite.sh`` are compared with them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import hardware, versions


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(act: Callable[[], Any], device: str, runs: int = 10) -> float:
    """The shortest of ``runs``."""
    best = float("inf")
    for _ in range(runs):
        synchronize(device)
        begun = time.perf_counter()
        act()
        synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best


def bandwidth(device: str) -> float:
    """Bytes read and written a second, by a copy of a large buffer."""
    size = 2**30 if device == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def matrix_peak(device: str) -> float:
    """Operations a second of a large bfloat16 product of random numbers."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)


def host_bandwidth(device: str) -> float:
    """Bytes a second from page-locked memory of the host to the device."""
    source = torch.ones(2**28 if device == "cuda" else 2**20, dtype=torch.uint8, pin_memory=device == "cuda")
    target = torch.empty_like(source, device=device)
    return source.numel() / seconds(lambda: target.copy_(source, non_blocking=True), device, 3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    packages = versions("peft", "triton", "liger-kernel", "flash-attn", "trl", "datasets", "vllm")
    print(json.dumps({"hardware": hardware(), "versions": packages}), flush=True)
    found = {"bytes_per_s": bandwidth(options.device), "flops_per_s": matrix_peak(options.device)}
    print(json.dumps(found | {"host_bytes_per_s": host_bandwidth(options.device)}))


if __name__ == "__main__":
    main()
