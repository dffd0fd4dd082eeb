"""What suits a device: the type to compute in, and the sizes of chunks of work.

The type follows from what the device reports, never from a measurement: one recipe gives one type on one machine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Names of a CPU's instructions for bfloat16: x86's, then ARM's.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that ``model.dtype`` names; ``auto`` is bfloat16 where the device has instructions for it."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return DTYPES[name]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16. False where that is not known."""
    if device.type == "cpu":
        return any(cpu_capabilities().get(name) for name in INSTRUCTIONS)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    query = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
    return bool(query and query())


def cpu_capabilities() -> dict[str, bool]:
    """Instructions of this CPU by name. torch reports them since 2.10; before, on Linux, /proc/cpuinfo does."""
    if (query := getattr(torch.cpu, "get_capabilities", None)) is not None:
        return query()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = [line.partition(":")[2] for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return {}
    return {name.replace("svebf16", "sve_bf16"): True for name in (flags[0].split() if flags else [])}


class LogitSizes(NamedTuple):
    """Numbers of logits: in a chunk (one product with the head's weight), in a tile, and kept for the backward pass."""

    chunk: int
    tile: int
    kept: int


# A CPU's chunk is 32 MB in float32: with half as much, products are slower. On an accelerator, products need thousands
# of rows to be fast, and larger tiles take fewer calls.
LOGITS = {
    "cpu": LogitSizes(chunk=8 << 20, tile=1 << 19, kept=8 << 20),
    "accelerator": LogitSizes(chunk=256 << 20, tile=64 << 20, kept=256 << 20),
}
# Tokens, and bytes kept for the backward pass, beyond which a larger micro-batch gained nothing. On a CPU, a model of
# 135 M parameters was as fast with 1,024 tokens as with 2,048 in float32 (in bfloat16 a seventh slower, for 290 MB
# less), and one of 0.85 M as fast with 4,096 as with 16,384 (docs/performance.md).
LARGEST = {"cpu": (8192, 0.75e9), "accelerator": (32768, float("inf"))}


def logit_sizes(device: torch.device) -> LogitSizes:
    return LOGITS[_kind(device)]


def largest_micro_batch(device: torch.device, kept: float) -> int:
    """Tokens beyond which a larger micro-batch is not faster, where a token keeps ``kept`` bytes."""
    tokens, kept_in_all = LARGEST[_kind(device)]
    return int(min(tokens, max(1, kept_in_all / kept)))


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "accelerator"
