"""Runs of episodes that are killed, while a tool runs too, and started again: the same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launching import ROOT, run_python
from tests.resuming import command, kill_after, lines, start, weights

pytestmark = pytest.mark.timeout(900)

MODEL = ROOT / "data/tiny_base"
GAME = (
    f"environment.path={ROOT}/tests/processes/slow_game.py:SlowGame",
    "environment.max_turns=4",
    "environment.max_turn_length=6",
    "environment.max_observation_length=8",
    "rewards=[{name: environment}]",
    "rollout.max_completion_length=20",
    "data.max_prompt_length=24",
    "data.train_size=24",
    "algorithm.credit=turn",
    "prompts.dynamic_sampling=true",
    "prompts.max_resample=1",
    "prompts.replay_groups=2",
    "training.max_steps=12",
    "training.save_every=1",
    "training.eval_every=5",
)


def game(folder: Path) -> tuple[str, ...]:
    folder.mkdir(exist_ok=True)
    return (*GAME, f"environment.args.folder={folder}")


def kill_at_work(process: subprocess.Popen[str], folder: Path, at_work: Path, growths: int) -> None:
    """SIGKILL while the game is at work: at its first answer after the run's log has grown so many times."""
    assert process.stderr is not None
    for watched in (*[folder / "metrics.jsonl"] * growths, at_work):
        before = bytes_of(watched)
        while bytes_of(watched) == before and process.poll() is None:
            time.sleep(0.001)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


def bytes_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


@pytest.mark.slow
def test_ten_sigkills_leave_no_trace_in_episodes(tmp_path: Path) -> None:
    """Five at random moments and five while an environment is at work. Checkpoints hold episodes (that may be
    replayed), draws inside an environment are those of its completion's key, and who is decoded together does not
    depend on the clock."""
    whole, folder, answers = tmp_path / "whole", tmp_path / "run", tmp_path / "answers"
    done = run_python(*command(MODEL, whole, *game(tmp_path / "of whole")))
    assert done.returncode == 0, done.stderr
    draw, ways = random.Random(0), [True, False] * 5
    for at_work in ways:
        process = start(MODEL, folder, "--resume", *game(answers))
        if at_work:
            kill_at_work(process, folder, answers / "answers", draw.randrange(4))
        else:
            kill_after(process, folder, draw.randrange(4), draw.uniform(0, 0.3))
    done = run_python(*command(MODEL, folder, "--resume", *game(answers)))
    assert done.returncode == 0, done.stderr
    assert lines(folder) == lines(whole)
    assert weights(folder) == weights(whole)
    of_steps = [row for row in lines(whole) if "reward" in row]
    assert all(row["completions/max_turns"] > 1 and row["completions/ended/error"] == 0 for row in of_steps)
    assert any(row["completions/ended/environment"] > 0 for row in of_steps)
    assert any(row["completions/ended/length"] > 0 for row in of_steps)
