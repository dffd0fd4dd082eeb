"""How processes of the sandbox are started: fresh interpreters with nothing of the trainer's."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.processes import on_staying_thread
from rewards.sandbox import confine
from rewards.sandbox.packages import Packages

START_TIMEOUT = 60.0
BOOT = "import sys; sys.path[:0] = [sys.argv[1]]; from rewards.sandbox.zygote import {entry}; sys.path.pop(0); "
BOOT += "{entry}(*sys.argv[2:])"
# A package's own threads would not be there after a fork.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8"}
ENVIRONMENT |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class SandboxUnavailable(RuntimeError):
    """No level of isolation works here; the message says what was tried and what would help."""


def start_place(level: str, packages: Packages, control_fd: int) -> subprocess.Popen[bytes]:
    """Start a place (``zygote.main``). Raises SandboxUnavailable."""
    names = json.dumps([packages.names, packages.paths, packages.roots])
    if level != "bubblewrap":
        return start_process("main", (str(control_fd), str(os.getpid()), level, names), control_fd)
    # as process 1 of its namespace the zygote sees no parent
    return start_process("main", (str(control_fd), "0", level, names), control_fd, _bubblewrap(packages))


def start_process(
    entry: str, arguments: Sequence[str], control_fd: int, before: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start a fresh interpreter that calls ``entry`` of ``zygote.py``; ``before`` is the program that starts it.

    ``-S``: no site-packages. The environment is empty except for a fixed hash seed. Raises SandboxUnavailable."""
    source = str(Path(__file__).resolve().parents[2])
    python = [os.path.realpath(sys.executable), "-S", "-c", BOOT.format(entry=entry), source, *arguments]
    try:
        return on_staying_thread(
            lambda: subprocess.Popen(
                [*before, *python],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(control_fd,),
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        )
    except OSError as why:
        raise SandboxUnavailable(str(why)) from why


def hello(control: socket.socket) -> dict[str, Any]:
    """What a process says once it is ready, or why it is not."""
    control.settimeout(START_TIMEOUT)
    try:
        said: dict[str, Any] = json.loads(control.recv(1 << 16) or b'{"refused": "its process ended at once"}')
    except (OSError, ValueError) as why:
        return {"refused": f"no answer: {why}"}
    return said


def _bubblewrap(packages: Packages) -> list[str]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxUnavailable("bwrap is not installed")
    own = [str(Path(__file__).resolve().parents[1]), os.path.realpath(sys.executable)]
    binds = [argument for path in confine.readable_paths() for argument in ("--ro-bind", path, path)]
    binds += [argument for path in confine.hidden_paths() for argument in ("--tmpfs", path)]
    binds += [argument for path in packages.paths for argument in ("--ro-bind", path, path)]
    binds += [argument for path in own for argument in ("--ro-bind", path, path)]
    links = [argument for link, to in confine.library_links().items() for argument in ("--symlink", to, link)]
    isolation = ["--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session", "--dev", "/dev"]
    return [bwrap, *isolation, *binds, *links, "--"]
