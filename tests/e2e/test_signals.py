"""A run that is asked to stop before its first step: real processes, real signals."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launching import ROOT, environment
from tests.resuming import command, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def listens(pid: int) -> bool:
    """Whether the process has a handler of SIGUSR1 by now."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGUSR1, 143, "asked to stop before the first step: there is nothing new to save"),
        (signal.SIGHUP, 143, "start again with --resume"),
        (signal.SIGINT, 130, ""),
    ],
)
def test_in_its_first_moments_it_ends_as_preempted(
    tiny_model: Path, tmp_path: Path, number: int, code: int, says: str
) -> None:
    """As soon as it listens, while it imports what it needs."""
    process = start(tiny_model, tmp_path / "run")
    wait_until(lambda: listens(process.pid))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_slurm_puts_it_back_into_the_queue(tiny_model: Path, tmp_path: Path) -> None:
    """By launch/slurm.sh with stand-ins for srun and scontrol; the early warning comes when the folder is claimed."""
    stand_ins = {
        "scontrol": 'echo "scontrol $*" >> "$LOG"; [ "$1" = show ] && echo localhost; exit 0',
        "srun": 'while [[ "$1" == --* ]]; do shift; done\nSLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"',
        "grpo": f'echo $$ > "$LOG.pid"; exec {shlex.quote(sys.executable)} -m grpo "$@"',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GRPO": str(tmp_path / "grpo"), "LOG": str(tmp_path / "log")}
    recipe = command(tiny_model, tmp_path / "run")[3]
    process = subprocess.Popen(
        ["bash", ROOT / "launch/slurm.sh", recipe], env=environment() | job | own, stderr=subprocess.PIPE, text=True
    )
    wait_until((tmp_path / "run/environment.json").exists)
    os.kill(int((tmp_path / "log.pid").read_text()), signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "scontrol requeue 7" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run/checkpoints").exists()
