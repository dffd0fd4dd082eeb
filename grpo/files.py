"""Files and folders that are there whole or not at all: written aside, synced to the disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grpo.errors import first_line


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``path`` aside and rename it: a reader sees the old content or the new, never a part.

    Text is written as UTF-8; a lone surrogate, which UTF-8 has no bytes for, is written as its escape (``\\udc80``).
    Raises OSError where the disk refuses; ``path`` is then as it was, and nothing is left beside it.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


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
    aside, replaced = final.with_name(f"{final.name}.tmp"), _replaced(final)
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
        move_in(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def move_in(aside: Path, final: Path) -> None:
    """Rename a folder. One that has the name already stays as ``NAME.old`` until the new one is in place, and comes
    back where that is refused."""
    replaced = _replaced(final)
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


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")


def why_not_written(final: Path, error: BaseException, needed: int) -> str:
    """Why a folder of ``needed`` bytes could not be written, for a message."""
    free = shutil.disk_usage(final.parent if final.parent.exists() else Path.cwd()).free
    full = "the disk is full; " if free < needed else ""
    return f"{full}it needs about {needed:,} bytes, {free:,} are free there ({first_line(error)})"
