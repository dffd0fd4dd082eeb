"""Rewards of the end-to-end tests: one that fails in a different way on every fifth completion, and its calm twin."""

from __future__ import annotations

import os
import signal
import zlib
from typing import Any


def fate(completion: str) -> int:
    """Which of twenty fates a completion has, by its text; the first four are failures."""
    return zlib.crc32(completion.encode()) % 20


def share_of_small_numbers(completion: str) -> float:
    words = completion.split()
    return sum(word.isdigit() and int(word) < 100 for word in words) / max(1, len(words))


def failing(completions: list[str], **kwargs: Any) -> list[float]:
    return [_fail(fate(completion), completion) for completion in completions]


def _fail(fate: int, completion: str) -> float:
    if fate == 0:
        while True:
            pass
    if fate == 1:
        raise KeyError("no such thing")
    if fate == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return float("nan") if fate == 3 else share_of_small_numbers(completion)


def calm(completions: list[str], **kwargs: Any) -> list[float | None]:
    """What ``failing`` would say if it said None where it fails."""
    return [share_of_small_numbers(completion) if fate(completion) > 3 else None for completion in completions]
