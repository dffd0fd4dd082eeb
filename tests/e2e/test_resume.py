"""Runs that are killed, preempted or finished, and started again with --resume. Real processes, real signals."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT, environment, run_python

pytestmark = pytest.mark.timeout(900)  # a dozen starts of a process, on machines of any speed

STEPS = 36
TIMES = ("time/", "step_time", "tokens_per_second")


def command(model: Path, folder: Path, *more: str) -> list[str]:
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(
        f"""
model: {{name: {model}, dtype: float32}}
data:
  name: countdown
  args: {{question: compact, min_numbers: 3, max_numbers: 3, max_number: 9, min_target: 1, max_target: 60}}
  eval_size: 8
  max_prompt_length: 16
rewards: [{{path: {ROOT}/tests/rewards_for_tests.py:share_of_small_numbers}}]
rollout: {{num_generations: 4, max_completion_length: 12}}
algorithm: {{beta: 0.01, sync_ref_model: true, ref_model_sync_steps: 5, num_minibatches: 2}}
optimizer: {{learning_rate: 1e-3, warmup_steps: 3, lr_scheduler_type: cosine}}
training: {{output_dir: {folder}, prompts_per_step: 4, max_steps: {STEPS}, save_every: 3, eval_every: 7}}
"""
    )
    return ["-m", "grpo", "train", str(recipe), *more]


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "final/model.safetensors").read_bytes()).hexdigest()


def start(model: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command(model, folder, *more)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def size(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_python(*command(tiny_model, folder))
    assert done.returncode == 0, done.stderr
    assert weights(folder) != hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    return folder


def kill_after(process: subprocess.Popen[str], folder: Path, growths: int, seconds: float) -> None:
    """SIGKILL, ``seconds`` after the run's log has grown so many times."""
    assert process.stderr is not None
    for _ in range(growths):
        before = size(folder)
        while size(folder) == before and process.poll() is None:
            time.sleep(0.01)
    time.sleep(seconds)
    assert process.poll() is None, process.stderr.read()  # still at work, so the kill hits
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


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


ALL_OF_IT = (  # what a checkpoint holds of prompts: where the order stands, pass rates, groups to replay
    "prompts.dynamic_sampling=true",
    "prompts.curriculum=true",
    "prompts.replay_groups=2",
    "prompts.max_resample=2",
    "data.train_size=24",
    f"rewards.0.path={ROOT}/tests/rewards_for_tests.py:length_divides_by_eight",
    "training.save_every=1",
    "training.max_steps=14",
)
