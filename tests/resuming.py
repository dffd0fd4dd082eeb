"""A small run to kill and to start again: its command, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.launching import ROOT, environment

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
