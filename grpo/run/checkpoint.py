"""Atomic, verified checkpoints. Here are files and folders only; ``state.py`` knows what is in them.

A checkpoint is a folder ``step_000100/`` with one ``.safetensors`` file per dictionary of tensors, one ``.pt`` file per
other state, and ``manifest.json``, which holds the sha256 of every file and of itself. Tensors that are split over
processes are in ``shards/`` (``shards.py``). It is written aside (``step_000100.tmp/``), the manifest last, synced to
the disk, and renamed, so a folder that bears the final name is whole. The hashes find what happens to it later: neither
``torch.load`` nor safetensors notices a flipped bit. There is no pointer file: the latest checkpoint is the newest
folder that verifies.

One process writes all but the shards. Folder names beside ``step_N``: ``.tmp`` is an unfinished write; ``.old`` is a
checkpoint while its replacement moves in; ``.abandoned`` is newer than the checkpoint a run went back to (see
``set_aside_newer``).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo.errors import RunError
from grpo.files import fsync, move_in, usual_modes, why_not_written
from grpo.run.manifest import SHARDS, read_manifest, write_manifest
from grpo.run.search import folders, step_of

log = logging.getLogger("grpo")

# numpy.random.get_state() holds one array; these globals let weights_only loading rebuild it.
# The function that does so is taken from pickle's protocol, because its name in numpy is private and has changed.
_REBUILD: Any = np.empty(0, np.uint32).__reduce__()[0]
_NUMPY_GLOBALS = [_REBUILD, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: everything that ``save_checkpoint`` was given, on the CPU."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    states: dict[str, Any]
    manifest: dict[str, Any]
    shards: Path | None
    """Where the tensors are that were split over processes."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: dict[str, dict[str, torch.Tensor]],
    states: dict[str, Any],
    manifest: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``root/step_{step:06d}`` atomically, delete the oldest beyond ``keep``, and return its path.

    ``tensors[name]`` becomes ``name.safetensors`` (tied and non-contiguous tensors are stored as copies),
    ``states[name]`` becomes ``name.pt``: containers, numbers, strings, tensors and numpy arrays, which load back
    without running code. ``manifest`` holds the caller's JSON values. A checkpoint of the same step is replaced only
    once the new one is whole.

    Raises RunError where the disk refuses (full, quota, read-only, I/O error): the partial folder is gone and earlier
    checkpoints are untouched. Raises TypeError for a state that could not be loaded back safely.
    """
    aside = begin(root, step)
    return commit(aside, tensors=tensors, states=states, manifest=manifest, keep=keep)


def begin(root: Path, step: int) -> Path:
    """Make the folder in which a checkpoint is written, and return it. ``commit`` or ``discard`` must follow.

    Raises RunError where the disk refuses.
    """
    final = root / f"step_{step:06d}"
    aside = final.with_name(final.name + ".tmp")
    with _explained(final, needed=0):
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        aside.mkdir()
    return aside


def discard(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)


def commit(
    aside: Path,
    *,
    states: dict[str, Any],
    manifest: dict[str, Any],
    keep: int,
    tensors: Mapping[str, dict[str, torch.Tensor]] | None = None,
    shards: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """The rest of ``save_checkpoint``, whose arguments and errors these are. ``shards`` are the files in ``shards/``
    that all processes have written, with their ``facts``."""
    final = aside.with_suffix("")
    tensors, shards = {name: _storable(group) for name, group in (tensors or {}).items()}, shards or {}
    try:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, so that a damaged checkpoint has a predecessor (given: {keep})")
        if clash := {"format", "files", "checksum"} & manifest.keys():
            raise ValueError(f"the manifest key(s) {sorted(clash)} are checkpoint.py's own")
        if missing := [name for name in shards if not (aside / SHARDS / name).exists()]:
            raise RunError(
                f"not all processes wrote into {aside} ({missing[0]} is missing): training.output_dir must be in a "
                "folder that all nodes share"
            )
        with _explained(final, needed=_nbytes([tensors, states])):
            for name, group in tensors.items():
                save_file(group, path := aside / f"{name}.safetensors")
                fsync(path)
            for name, state in states.items():
                torch.save(state, path := aside / f"{name}.pt")
                fsync(path)
                _refuse_unsafe(path)
            usual_modes(aside)
            if shards:
                fsync(aside / SHARDS)
            write_manifest(aside, {**manifest, "step": step_of(final)}, shards)
            move_in(aside, final)
    finally:
        discard(aside)
    _prune(final.parent, keep)
    return final


@contextmanager
def _explained(final: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Where a write fails, torch.save may raise RuntimeError and safetensors its own error, instead of OSError.
        raise RunError(_explain(final, error, needed)) from error


def _storable(group: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as safetensors wants them: on the CPU, contiguous, and no two sharing memory."""
    stored: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in group.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        stored[name] = plain
    return stored


def _refuse_unsafe(path: Path) -> None:
    with torch.serialization.safe_globals(_NUMPY_GLOBALS):
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if unsafe:
        raise TypeError(
            f"the state {path.stem!r} holds {', '.join(unsafe)}, which cannot be loaded back without running code; "
            "save containers, numbers, strings, tensors or numpy arrays instead"
        )


def _sweep(root: Path) -> None:
    """Clear what a killed process left: unfinished writes go; a checkpoint whose replacement never came returns."""
    for path in root.glob("step_*.tmp"):
        shutil.rmtree(path)
    for path in root.glob("step_*.old"):
        if path.with_suffix("").exists():
            shutil.rmtree(path)
        else:
            os.rename(path, path.with_suffix(""))


def _prune(root: Path, keep: int) -> None:
    """Delete the oldest beyond ``keep`` and what a resume set aside. Failing to is no reason to stop a run."""
    for path in [*folders(root)[keep:], *root.glob("step_*.abandoned")]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            log.warning("could not delete the old checkpoint %s: %s", path, error)


def _explain(final: Path, error: BaseException, needed: int) -> str:
    older = folders(final.parent) if final.parent.exists() else []
    return (
        f"could not write the checkpoint {final}: {why_not_written(final, error, needed)}. "
        + (f"Earlier checkpoints are intact, the newest is {older[0].name}. " if older else "")
        + "Free some space or raise the quota, then go on with --resume."
    )


def _nbytes(value: Any) -> int:
    """Bytes of all tensors and arrays inside nested containers."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(map(_nbytes, value))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_checkpoint(path: Path, *, lazily: bool = False) -> Checkpoint:
    """Read a checkpoint that has been verified. ``lazily``: tensors are read from the disk when they are used."""
    manifest = read_manifest(path)
    files = [path / name for name in manifest["files"] if not name.startswith(f"{SHARDS}/")]
    has_shards = len(files) < len(manifest["files"])
    with torch.serialization.safe_globals(_NUMPY_GLOBALS):
        return Checkpoint(
            step=manifest["step"],
            tensors={file.stem: load_file(file) for file in files if file.suffix == ".safetensors"},
            states={
                file.stem: torch.load(file, map_location="cpu", weights_only=True, mmap=lazily)
                for file in files
                if file.suffix == ".pt"
            },
            manifest=manifest,
            shards=path / SHARDS if has_shards else None,
        )


def set_aside_newer(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints in ``root`` newer than ``step``. Call when a run goes on from ``step``.

    They become ``step_N.abandoned``, so that ``latest_checkpoint`` does not return to them, and are deleted after the
    next successful save. Returns their new paths.
    """
    aside = []
    for newer in (folder for folder in folders(root) if step_of(folder) > step):
        target = newer.with_name(f"step_{step_of(newer):06d}.abandoned")
        if target.exists():
            shutil.rmtree(target)
        os.rename(newer, target)
        aside.append(target)
    return aside
