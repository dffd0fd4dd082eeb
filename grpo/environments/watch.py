"""What an episode has started, all together: how many processes, and how much memory they hold."""

from __future__ import annotations

import contextlib
import os

from rewards.processes import living_below

MAX_PROCESSES = 64  # that an episode may have at once


def too_much(guard: int, memory_bytes: int | None) -> tuple[str, str] | None:
    """The cause and the words where the processes below a guard are too many, or hold more memory than one may; else
    None."""
    processes = living_below(guard)
    if len(processes) > MAX_PROCESSES:
        return "crashed", f"it has started more than {MAX_PROCESSES} processes"
    several = memory_bytes is not None and len(processes) > 1  # one alone has a limit of its own
    if several and _resident(processes) > memory_bytes and _own_memory(processes) > memory_bytes:  # type: ignore[operator]
        return "memory", f"its {len(processes)} processes take more than environment.memory_limit_gb together"
    return None


def _resident(pids: list[int]) -> int:
    """Bytes of memory that processes hold, with what they share counted in each."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm") as file:
            total += int(file.read().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE")


def _own_memory(pids: list[int]) -> int:
    """Bytes of memory that they hold, with their share of what they share."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/smaps_rollup") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total << 10
