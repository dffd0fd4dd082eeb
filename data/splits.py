"""Which split a task belongs to, for tasks that are generated."""

from __future__ import annotations

import hashlib


def held_out(task: str, share: int) -> bool:
    """Whether a task is in the held-out split. One in ``share`` is, by a hash of ``task`` alone.

    ``task`` identifies the task, so that neither seed, size nor wording moves it to the other split.
    """
    return int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big") % share == 0
