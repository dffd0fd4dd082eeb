"""The folder that weights pass through: in shared memory, and gone when its process is."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from grpo.errors import UserError

PREFIX = "grpo-vllm-"
SHARED_MEMORY = Path("/dev/shm")


def make_scratch(folder: str | None) -> tempfile.TemporaryDirectory[str]:
    """A folder for this process under ``folder`` (``rollout.vllm_sync_dir``), or in shared memory.

    In shared memory, what a killed process left is removed first: it would hold a whole model. Each process holds a
    lock on its own, because containers that share the memory do not see each other's processes. Raises UserError where
    ``folder`` cannot be written.
    """
    if folder is None and SHARED_MEMORY.is_dir():
        folder = str(SHARED_MEMORY)
        for old in SHARED_MEMORY.glob(f"{PREFIX}*"):
            owner = old.name.removeprefix(PREFIX).split("-")[0]
            if owner.isdigit() and not Path(f"/proc/{owner}").exists() and _lock(old):
                shutil.rmtree(old, ignore_errors=True)  # another user's stays
    try:
        made = tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=folder)
    except OSError as error:
        raise UserError(f"rollout.vllm_sync_dir: cannot write in {folder}: {error.strerror}") from None
    _lock(Path(made.name))
    return made


def _lock(folder: Path) -> bool:
    """Hold a folder to the end of this process; False where another process holds it."""
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return False
    return True
