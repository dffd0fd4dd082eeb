"""GPUs by their makers' data sheets. Nothing of them was measured here."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Card:
    """``bytes`` as its driver reports them; ``flops`` of dense bfloat16 and ``bandwidth`` in bytes, both a second."""

    title: str
    bytes: float
    flops: float
    bandwidth: float

    @property
    def word(self) -> str:
        """What a driver's name of the device has in it: ``NVIDIA H100 80GB HBM3``."""
        return self.title.partition(",")[0].removeprefix("RTX ").split()[0]


CARDS = {
    "24gb": Card("RTX 4090, 24 GB", 25.6e9, 165e12, 1.01e12),
    "48gb": Card("L40S, 48 GB", 48.1e9, 362e12, 0.86e12),
    "80gb": Card("A100, 80 GB", 85.5e9, 312e12, 2.04e12),
    "h100": Card("H100 SXM, 80 GB", 85.5e9, 989e12, 3.35e12),
    "h200": Card("H200, 141 GB", 150.7e9, 989e12, 4.8e12),
}


def sheet_for(name: str, memory: float) -> Card | None:
    """The card by whose sheet to plan for a device, with the memory that it has: the one of its name, else the largest
    that has no more. None for a device smaller than all."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    named = [card for card in CARDS.values() if card.word in words]
    smaller = sorted((card for card in CARDS.values() if card.bytes <= memory), key=lambda card: -card.bytes)
    found = next(iter([*named, *smaller]), None)
    return None if found is None else replace(found, title=name, bytes=memory)
