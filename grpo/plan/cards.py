"""GPUs by their makers' data sheets. Nothing of them was measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """``bytes`` as its driver reports them; ``flops`` of dense bfloat16 and ``bandwidth`` in bytes, both a second."""

    title: str
    bytes: float
    flops: float
    bandwidth: float


CARDS = {
    "24gb": Card("RTX 4090, 24 GB", 25.6e9, 165e12, 1.01e12),
    "48gb": Card("L40S, 48 GB", 48.1e9, 362e12, 0.86e12),
    "80gb": Card("A100, 80 GB", 85.5e9, 312e12, 2.04e12),
    "h100": Card("H100 SXM, 80 GB", 85.5e9, 989e12, 3.35e12),
    "h200": Card("H200, 141 GB", 150.7e9, 989e12, 4.8e12),
}
