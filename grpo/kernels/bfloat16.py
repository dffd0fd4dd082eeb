"""Linear layers of bfloat16 numbers on CPUs that have no instructions for them: most that are not servers' newest.

There oneDNN emulates them at a quarter of float32's speed. float32 holds every bfloat16 number, so operands are widened
and multiplied by float32's instructions, and the sums rounded once (``grads_in_place.py``; DDP and FSDP go without).
"""

from __future__ import annotations

from functools import cache

import torch

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "amx_tile", "avx10_2", "bf16", "sve_bf16")  # of x86, and of ARM


@cache
def emulated() -> bool:
    """Has this CPU none of them? A torch that cannot say (before 2.10) is taken for one on a CPU that has."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities) and not any(capabilities.get(name) for name in INSTRUCTIONS)


def multiplied_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to compute products of ``dtype`` numbers in."""
    return torch.float32 if dtype == torch.bfloat16 and device.type == "cpu" and emulated() else dtype
