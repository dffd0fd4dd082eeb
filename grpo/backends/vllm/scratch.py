"""The folder that weights pass through. It is in shared memory and goes with its process."""

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

    In shared memory, folders of killed processes are removed first, because each holds a whole model. Each process
    locks its own folder, because containers that share the memory do not see each other's processes.

    Raises:
        UserError: ``folder`` cannot be written.
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
    """Lock a folder until this process ends. False where another process has it locked."""
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
