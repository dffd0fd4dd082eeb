"""`accelerate launch` of the command on two processes, of which one is stopped or was started otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rewards.processes import children_of
from tests.launching import DDP, environment, free_port
from tests.resuming import command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHORT = ("rollout.max_completion_length=4", "evaluation.at_start=false", "training.eval_every=0")


@contextmanager
def launched(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A launch of two processes, all of which are gone afterwards."""
    common = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [*DDP, *common, f"--main_process_port={free_port()}", *map(str, arguments)]
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *command],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for pid in [*ranks_of(process.pid).values(), process.pid]:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        process.wait()


def ranks_of(launcher: int) -> dict[int, int]:
    """The process id of each rank."""
    found = {}
    for pid in children_of(launcher):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(one.removeprefix(b"RANK=")): pid for one in variables if one.startswith(b"RANK=")}
    return found


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_other_which_names_it(tiny_model: Path, tmp_path: Path, stopped: int) -> None:
    """Within training.peer_timeout. The launcher then takes another 30 seconds to give the stopped one up."""
    metrics = tmp_path / "run/metrics.jsonl"
    arguments = command(tiny_model, tmp_path / "run", *SHORT, "training.peer_timeout=5", "training.max_steps=100000")
    with launched(*arguments) as process:
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        ranks = ranks_of(process.pid)
        os.kill(ranks[stopped], signal.SIGSTOP)
        begun = time.monotonic()
        while runs(ranks[1 - stopped]):
            assert time.monotonic() - begun < 5 + 10
            time.sleep(0.05)
        os.kill(ranks[stopped], signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert f"rank {stopped} (on " in said
    assert f"its process {ranks[stopped]} is stopped (by SIGSTOP or a debugger) and has said nothing for" in said
    assert "Start all of them again with --resume." in said


def test_a_rank_that_was_started_with_another_recipe_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """Sharded weights are held once, so that another learning rate would show nowhere later."""
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\nfrom grpo.__main__ import main\n"
        "if os.environ['RANK'] == '1':\n    sys.argv.append('optimizer.learning_rate=0.1')\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    arguments = command(tiny_model, tmp_path / "run")[2:]
    with launched(script, *arguments) as process:
        said = process.communicate(timeout=120)[1]
    assert "was started with another recipe than rank 0" in said
    assert "optimizer.learning_rate: 0.1, there 0.001" in said
    assert not (tmp_path / "run").exists()
