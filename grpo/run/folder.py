"""The run folder before training starts: refuse it or lock it, and record what the run is and where it runs.

Everything here happens before the model loads and touches nothing of an earlier run. One process of a run (rank 0)
calls it. The lock is the kernel's (``flock``): it vanishes with the process that holds it, however that dies.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from grpo.config.yaml_text import dump
from grpo.errors import UserError
from grpo.files import write_whole
from grpo.run.owner import sign
from grpo.run.same_run import check_same_recipe
from grpo.run.secrets import command_without_secrets, recipe_without_secrets
from grpo.run.trackers import check_installed

if TYPE_CHECKING:
    from grpo.config import Recipe

log = logging.getLogger("grpo")

LOCK = ".lock"
# What makes a folder used. A recipe alone does not: a run that failed before its first step may simply be repeated.
RESULTS = ("metrics.jsonl", "checkpoints", "rollouts", "best", "final", "report.html")
PACKAGES = (
    *("grpo-train", "torch", "transformers", "tokenizers", "accelerate", "datasets", "peft", "safetensors", "numpy"),
    *("pydantic", "math-verify", "pebble", "vllm", "deepspeed", "bitsandbytes", "flash-attn"),
    *("wandb", "tensorboard", "trackio"),
)
# Settings worth keeping. Never the whole environment: it holds keys.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "SLURM_JOB_ID")

_held: dict[Path, TextIO] = {}  # open lock files: closing one releases its lock


def prepare_run_folder(
    recipe: Recipe,
    resume: bool | str,
    check: Callable[[Path], None] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Path:
    """Make ``training.output_dir`` this run's, and write ``recipe.yaml`` and ``environment.json`` into it.

    ``check`` looks at the folder when it is locked and unchanged, and may refuse it. ``inputs`` are hashes for
    ``environment.json``. On resume, files that it replaces are kept as ``recipe.previous.yaml`` and
    ``environment.previous.json``. Raises UserError, having changed nothing, where
    - the folder holds another run's results and ``resume`` is False;
    - a live run has locked the folder, or it cannot be written;
    - a tracker that the recipe asks for is not installed;
    - a resumed run's recipe differs in a key that may not change.
    """
    check_installed(recipe.tracking)
    folder = Path(recipe.training.output_dir)
    if not resume:
        refuse_used(folder)
    holder_before = lock_folder(folder, "training.output_dir")
    try:
        if not resume:
            refuse_used(folder)  # again: a run may have used it and ended between the first look and the lock
        if check is not None:
            check(folder)
        _record(folder, recipe, inputs, started=bool(resume) and any(folder.glob("checkpoints/step_*")))
    except BaseException:
        _name_holder(_held[folder.resolve()], holder_before)
        release_run_folder(folder)
        raise
    return folder


def release_run_folder(folder: Path) -> None:
    """Give up the lock, for a process that goes on after its run. Without this call it ends with the process."""
    if lock := _held.pop(folder.resolve(), None):
        lock.close()


def is_running(folder: Path) -> bool:
    """Whether a live run holds the folder. It changes nothing: a lock that is free is let go at once."""
    try:
        with (folder / LOCK).open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:  # no run has locked it, or this filesystem has no locks
        return False


def refuse_used(folder: Path) -> None:
    """Raises UserError where a run has left something in the folder. It changes nothing."""

    def is_used(path: Path) -> bool:
        return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0

    try:
        used = [name for name in RESULTS if is_used(folder / name)]
    except OSError as error:
        raise _not_writable(folder, error, "training.output_dir") from error
    if used:
        free = next(name for n in itertools.count(2) if not (name := folder.with_name(f"{folder.name}-{n}")).exists())
        raise UserError(
            f"training.output_dir: {folder} already holds a run ({', '.join(used)}). Either go on with it (--resume), "
            f"or start this one elsewhere (training.output_dir={free})."
        )


def _make_writable(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # the only reliable test: permissions say nothing to root or NFS
            pass
    except OSError as error:
        raise _not_writable(folder, error, key) from error


def _not_writable(folder: Path, error: OSError, key: str) -> UserError:
    return UserError(f"{key}: cannot write to {folder}: {error.strerror or error}")


def lock_folder(folder: Path, key: str) -> str:
    """Make a folder, and lock it for this process until it ends or ``release_run_folder``. Returns what the lock's file
    said before. Raises UserError, with the recipe's ``key``, where it cannot be written or is locked."""
    _make_writable(folder, key)
    if folder.resolve() in _held:
        raise UserError(f"{key}: this process already runs in {folder}")
    lock = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise UserError(
            f"{key}: {folder} is in use by a live run ({holder}). Wait for it, stop it, or choose another {key}."
        ) from None
    except OSError as error:
        log.warning("%s cannot be locked on this filesystem (%s): never start a second run in it", folder, error)
    lock.seek(0)
    before = lock.read()
    _name_holder(lock, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    _held[folder.resolve()] = lock
    return before


def _name_holder(lock: TextIO, text: str) -> None:
    lock.truncate(0)
    lock.write(text)
    lock.flush()


def _record(folder: Path, recipe: Recipe, inputs: Mapping[str, str] | None, *, started: bool) -> None:
    path = folder / "recipe.yaml"
    if started and (before := _recipe_before(path)) is not None:
        check_same_recipe(before, recipe)
    _replace(path, dump(recipe_without_secrets(recipe)))
    found = environment() | ({} if inputs is None else {"inputs": dict(inputs)})
    _replace(folder / "environment.json", json.dumps(found, indent=2) + "\n")
    sign(folder)


def _recipe_before(path: Path) -> dict[str, Any] | None:
    """The recipe that the folder's run was last started with; None where that is not known. Checkpoints have theirs."""
    try:
        value = yaml.safe_load(path.read_bytes())
    except (FileNotFoundError, yaml.YAMLError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _replace(path: Path, text: str) -> None:
    """Write ``path`` whole; a former version that differs stays beside it as ``NAME.previous.EXT``. Where the disk
    refuses, ``path`` is as it was."""
    if path.exists() and (before := path.read_bytes()) != text.encode("utf-8", "backslashreplace"):
        write_whole(path.with_suffix(f".previous{path.suffix}"), before)
    write_whole(path, text)


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs


def environment() -> dict[str, Any]:
    """Versions, hardware, source and command line of this process, as JSON values."""
    import torch

    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(command_without_secrets(_command())),
        "directory": os.getcwd(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "source": _source(),
        "cpu": {"model": _cpu_model(), "cores": _cores(), "memory_gb": _memory_gb()},
        "gpus": [
            {"name": facts.name, "memory_gb": round(facts.total_memory / 2**30, 1)}
            for facts in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _command() -> list[str]:
    program = Path(sys.argv[0]).name
    return [*(["python", "-m", "grpo"] if program == "__main__.py" else [program]), *sys.argv[1:]]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _source() -> dict[str, Any] | None:
    """Commit and cleanliness, where this package is tracked by a git checkout (and not merely installed inside one)."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--", "../.."))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cores() -> int:
    """Cores this process may use, which in a container or a batch job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
