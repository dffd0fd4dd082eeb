"""Which split a task belongs to, for tasks that are made and not read."""

from __future__ import annotations

import hashlib


def held_out(task: str, share: int) -> bool:
    """Whether a task is in the held-out split: one in ``share`` is, by a hash of ``task`` alone.

    ``task`` is what makes two tasks the same, so that neither seed, size nor wording moves one to the other split.
    """
    return int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big") % share == 0
