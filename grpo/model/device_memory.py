"""Total and free memory of an accelerator, or of the machine as far as this process may use it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CGROUP_USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def total_memory(device: torch.device) -> int:
    """Bytes of the device. For a CPU: of the machine, or the control group's limit if that is lower."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in map(Path, CGROUP_LIMITS):
        if path.exists() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still get from the device. For a CPU: its share of what the machine and the control
    group have left; the processes of the launch on this machine share equally."""
    if device.type == "cuda":
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept_by_torch
    free = total_memory(device)
    if (meminfo := Path("/proc/meminfo")).exists():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    for limit, used in zip(map(Path, CGROUP_LIMITS), map(Path, CGROUP_USED), strict=True):
        if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
            free = min(free, int(text) - int(used.read_text()))
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
