"""A reward that a pretrained model climbs at once, for benchmarks that compare learning curves."""

from __future__ import annotations

from typing import Any


def digits(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
    """The share of a completion's characters that are digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
