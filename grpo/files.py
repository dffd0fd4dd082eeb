"""Files and folders on their way to their names: written, synced to the disk, readable by whom the user lets read.

Nothing of the project is imported here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usual_modes(folder: Path) -> None:
    """Give the files in ``folder`` the mode of any new file there. safetensors lets the owner alone read its own."""
    probe = folder / ".mode.tmp"
    probe.touch()  # asks the umask, or the folder's own rules
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write in, which becomes ``final`` where the block ends without an error, and is gone otherwise.

    A folder that has the name already is replaced once the new one is synced to the disk. A process that is killed may
    leave ``NAME.tmp``, and the replaced one as ``NAME.old``; the next call sees to both.
    """
    aside, replaced = (final.with_name(f"{final.name}.{end}") for end in ("tmp", "old"))
    if replaced.exists() and not final.exists():
        os.rename(replaced, final)
    for left in (aside, replaced):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        usual_modes(aside)
        for path in [*aside.rglob("*"), aside]:
            fsync(path)
        if final.exists():
            os.rename(final, replaced)
        try:
            os.rename(aside, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        fsync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
