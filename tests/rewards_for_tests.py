"""Reward functions that an untrained model gets different rewards from, so that runs in tests have a gradient."""

from __future__ import annotations


def share_of_small_numbers(completions: list[str], **_: object) -> list[float]:
    """Share of words that are numbers under 50."""
    return [sum(w.isdigit() and int(w) < 50 for w in c.split()) / max(1, len(c.split())) for c in completions]
