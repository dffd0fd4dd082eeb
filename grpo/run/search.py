"""Which checkpoints a folder has, and which of them verifies."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from grpo.errors import UserError
from grpo.run.manifest import GONE, MANIFEST, DamagedCheckpoint, UnreadableCheckpoint, verify
from grpo.run.read import read_jsonl

log = logging.getLogger("grpo")

FOLDER = re.compile(r"step_(\d{6,})(\.old)?")
ROLLOUTS = re.compile(r"step_(\d+)\.jsonl")


def find_checkpoint(folder: Path, resume: bool | str) -> Path | None:
    """The checkpoint of a run to go on from: the one named, or the newest that verifies; None to start at step 0.

    Changes nothing. Raises UserError where a run that starts at step 0 would write over one that was further: no
    checkpoint verifies, they are gone, or they could not be read.
    """
    if not resume:
        return None
    if isinstance(resume, str):
        return verified_checkpoint(Path(resume))
    root = folder / "checkpoints"
    found, damaged = search(root)
    if found is None:
        if damaged:
            raise UserError(
                f"--resume: none of the checkpoints in {root} can be used\n{_listed(damaged)}\nNothing was changed. "
                "Bring one of them back, or start a new run in another training.output_dir."
            )
        _refuse_lost(folder)
        log.warning("--resume: no checkpoint in %s yet, starting at step 0", root)
    _say_skipped(damaged)
    return found


def _say_skipped(damaged: Mapping[Path, str]) -> None:
    for path, why in damaged.items():
        log.warning("skipping checkpoint %s: %s", path, why)


def _refuse_lost(folder: Path) -> None:
    """Raise UserError where a run without checkpoints is so far that it must have written one."""
    step, every = _last_step(folder), _save_every(folder / "recipe.yaml")
    final = folder / "final"
    if final.is_dir() and any(final.iterdir()):
        what = f"{final}, which is the end of a run"
    elif step and every is None:
        what = f"metrics or rollouts of {step} steps, and no recipe.yaml that says how often it was saved"
    elif every and step > every:
        what = f"metrics or rollouts of {step} steps, with a checkpoint every {every}"
    else:
        return
    raise UserError(
        f"--resume: {folder} has {what}, but no checkpoint: to start at step 0 would write over it. Nothing was "
        "changed. Bring its checkpoints back, or start a new run in another training.output_dir."
    )


def _last_step(folder: Path) -> int:
    """Of metrics and rollouts; 0 where there are none. Raises UserError where metrics can't be read back."""
    metrics = folder / "metrics.jsonl"
    logged = [row["step"] for row in read_jsonl(metrics)] if metrics.exists() else []
    sampled = [int(match[1]) for path in folder.glob("rollouts/step_*") if (match := ROLLOUTS.fullmatch(path.name))]
    return max(logged + sampled, default=0)


def _save_every(recipe: Path) -> int | None:
    """Of the run that was in the folder; None where that is not known."""
    try:
        training = yaml.safe_load(recipe.read_text(encoding="utf-8"))["training"]
        return int(training["save_every"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint in ``root`` that verifies, or None. A warning names each one skipped, and why.

    Raises UserError as ``search`` does.
    """
    found, damaged = search(root)
    _say_skipped(damaged)
    return found


def search(root: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint in ``root`` that verifies (None: no one does), and of all newer ones why they do not.

    Raises:
        UserError: what might be the newest could not be read. A run that went on from an older one would delete it.
    """
    damaged: dict[Path, str] = {}
    unreadable: dict[Path, str] = {}
    found = None
    for path in names(root):
        try:
            verify(path)
            found = path
            break
        except DamagedCheckpoint as damage:
            damaged[path] = str(damage)
        except UnreadableCheckpoint as error:
            unreadable[path] = str(error)
    if unreadable:
        lines = {**damaged, **{path: f"could not be read: {why}" for path, why in unreadable.items()}}
        raise UserError(
            f"--resume: not all checkpoints in {root} could be read\n{_listed(lines)}\nThat is no damage, and nothing "
            "was changed. Start again when they can be read"
            + (f", or go back to the newest that can: --resume-from {found}" if found else "")
        )
    return found, damaged


def _listed(reasons: Mapping[Path, str]) -> str:
    width = max(len(path.name) for path in reasons)
    return "\n".join(f"  {path.name:<{width}}  {why}" for path, why in reasons.items())


def names(root: Path) -> list[Path]:
    """What is called as a checkpoint is, newest first, whatever it is. Raises UserError where the folder cannot be
    read."""
    try:
        names = os.listdir(root)
    except OSError as error:
        if error.errno in GONE and not os.path.lexists(root):
            return []
        raise UserError(f"--resume: cannot look for checkpoints in {root}: {error.strerror or error}") from error
    return newest_first(root / name for name in names if FOLDER.fullmatch(name))


def verified_checkpoint(path: Path) -> Path:
    """A checkpoint that someone named. Raises UserError where it is missing or does not verify."""
    if not path.is_dir() or not ((path / MANIFEST).exists() or FOLDER.fullmatch(path.name)):
        raise UserError(f"no checkpoint at {path}: {_what_there_is(path)}")
    try:
        verify(path)
    except DamagedCheckpoint as damage:
        raise UserError(
            f"the checkpoint {path} cannot be used: {damage}. Name another one, or give --resume alone to take the "
            "newest that verifies."
        ) from damage
    except UnreadableCheckpoint as error:
        raise UserError(f"the checkpoint {path} could not be read: {error}. Nothing was changed.") from error
    return path


def folders(root: Path) -> list[Path]:
    """Complete checkpoints by name, newest first."""
    return newest_first(path for path in root.glob("step_*") if FOLDER.fullmatch(path.name) and path.is_dir())


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """A ``.old`` one comes after the one that replaced it."""
    return sorted(paths, key=lambda path: (step_of(path), path.suffix == ""), reverse=True)


def step_of(path: Path) -> int:
    match = FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def _what_there_is(path: Path) -> str:
    for root in (path / "checkpoints", path, path.parent):
        if names := [folder.name for folder in reversed(folders(root))]:
            return f"{root} has {', '.join(names)}"
    return "the folder does not exist" if not path.parent.is_dir() else f"{path.parent} holds no checkpoint"
