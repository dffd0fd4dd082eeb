"""Runs that are killed, preempted or finished, and started again with --resume. Real processes, real signals."""

from __future__ import annotations

import hashlib
import random
import signal
import time
from pathlib import Path

import pytest

from tests.launching import run_python
from tests.resuming import STEPS, command, kill_after, lines, size, start, weights

pytestmark = pytest.mark.timeout(900)  # a dozen starts of a process, on machines of any speed


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_python(*command(tiny_model, folder))
    assert done.returncode == 0, done.stderr
    assert weights(folder) != hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    return folder


@pytest.mark.slow
def test_ten_sigkills_leave_no_trace(undisturbed: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Killed at ten random moments, start-up, rollouts, updates and saving among them: the same bits in the end."""
    draw = random.Random(0)
    folder = tmp_path / "run"
    kills = 0
    while kills < 10:
        process = start(tiny_model, folder, "--resume")
        kill_after(process, folder, draw.randrange(4), draw.uniform(0, 0.3))  # 0: somewhere in start-up
        kills += 1
    done = run_python(*command(tiny_model, folder, "--resume"))
    assert done.returncode == 0, done.stderr
    assert lines(folder) == lines(undisturbed)
    assert weights(folder) == weights(undisturbed)


@pytest.mark.slow
def test_sigterm_saves_exits_143_and_resumes_to_the_same_bits(
    undisturbed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(tiny_model, folder)
    while size(folder) < 3000 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "--resume" in said
    assert 0 < max(row["step"] for row in lines(folder)) < STEPS
    done = run_python(*command(tiny_model, folder, "--resume"))
    assert done.returncode == 0, done.stderr
    assert lines(folder) == lines(undisturbed)
    assert weights(folder) == weights(undisturbed)


@pytest.mark.slow
def test_a_finished_run_resumed_exits_0_and_changes_nothing(undisturbed: Path, tiny_model: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes(), weights(undisturbed)
    done = run_python(*command(tiny_model, undisturbed, "--resume"))
    assert done.returncode == 0, done.stderr
    assert ((undisturbed / "metrics.jsonl").read_bytes(), weights(undisturbed)) == before


@pytest.mark.slow
def test_a_used_folder_is_refused_without_resume(undisturbed: Path, tiny_model: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    done = run_python(*command(tiny_model, undisturbed))
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_another_seed_is_another_run(undisturbed: Path, tiny_model: Path) -> None:
    done = run_python(*command(tiny_model, undisturbed, "--resume", "training.seed=1"))
    assert done.returncode == 2
    assert "training.seed" in done.stderr
