"""Which prompts a run draws that is killed and goes on, beside one that is left alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.launching import run_python
from tests.resuming import ALL_OF_IT, command, kill_after, lines, start, weights

pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
def test_sigkills_leave_no_trace_in_which_prompts_are_drawn(tiny_model: Path, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    done = run_python(*command(tiny_model, whole, *ALL_OF_IT))
    assert done.returncode == 0, done.stderr
    draw = random.Random(1)
    for _ in range(2):
        process = start(tiny_model, folder, "--resume", *ALL_OF_IT)
        kill_after(process, folder, 4, draw.uniform(0, 0.3))
    done = run_python(*command(tiny_model, folder, "--resume", *ALL_OF_IT))
    assert done.returncode == 0, done.stderr
    assert lines(folder) == lines(whole)
    assert weights(folder) == weights(whole)
    rounds = [row["dynamic_sampling/rounds"] for row in lines(whole) if "reward" in row]
    assert len(set(rounds)) > 1
