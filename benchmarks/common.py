"""Shared by the benchmarks: names of machine and versions, memory, turns on a shared machine, tables."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of the packages named, and of those that every benchmark uses, if they are installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", *packages):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, threads and the accelerator, if there is one."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    found = {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "avx512_bf16": "avx512_bf16" in cpuinfo,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def log_to_stderr() -> None:
    """Show what the trainer's rooms say of themselves: which way they took, and why not another."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("grpo").setLevel(logging.INFO)


def descendants(pid: int) -> list[int]:
    """A process and its descendants that still run."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def end_in_order() -> None:
    """Make SIGTERM run every ``finally``, as Ctrl-C does, so that a benchmark's servers and processes end with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def peak_memory_mb() -> float:
    """The sum of the peaks (VmHWM) of this process and those it started; with a GPU, the peak of its memory instead."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 2**20
    total = 0.0
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError, IndexError):
            total += int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return total


@contextlib.contextmanager
def turn(lock: str | None) -> Iterator[None]:
    """Within it, this job runs alone among the jobs that take the same file's lock."""
    if lock is None:
        yield
        return
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    time.sleep(2)  # or a loop that takes the lock again would always beat whoever waits


@contextlib.contextmanager
def timed(functions: Mapping[str, Callable[..., Any]], package: str, device: Any = "cpu") -> Iterator[dict[str, float]]:
    """Within it, counts the seconds in each of these functions, in all modules of ``package`` that have it by name."""
    seconds = dict.fromkeys(functions, 0.0)
    wait = _synchronizer(device)
    replaced: list[tuple[Any, str, Any]] = []

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            wait()
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                wait()
                seconds[name] += time.perf_counter() - begun

        return call

    for name, function in functions.items():
        call = wrapped(name, function)
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith(package) and getattr(module, function.__name__, None) is function:
                replaced.append((module, function.__name__, function))
                setattr(module, function.__name__, call)
    try:
        yield seconds
    finally:
        for module, attribute, function in replaced:
            setattr(module, attribute, function)


def _synchronizer(device: Any) -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None


def median(values: list[float]) -> float:
    return float(statistics.median(values)) if values else float("nan")


def print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a row; the columns are the first row's."""
    print(f"\n{title}")
    columns = list(next(iter(rows.values())))
    first = max(map(len, rows))
    widths = [max(len(c), 10) for c in columns]
    print(" " * first, *(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)), sep="  ")
    for name, row in rows.items():
        cells = (_cell(row.get(c), w) for c, w in zip(columns, widths, strict=True))
        print(f"{name:<{first}}", *cells, sep="  ", flush=True)


def _cell(value: Any, width: int) -> str:
    if isinstance(value, float):
        return f"{value:>{width}.4g}" if abs(value) < 10_000 else f"{value:>{width}.0f}"
    return f"{'' if value is None else str(value):>{width}}"
