"""``grpo data filter`` killed at random moments and run again: the same bytes as undisturbed. Real signals."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launching import ROOT, environment, run_python

pytestmark = pytest.mark.timeout(600)

KILLS = 6


def command(model: Path, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    recipe = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"name": "countdown", "args": {"question": "compact"}, "train_size": 160, "eval_size": 4}
        | {"max_prompt_length": 32},
        "rewards": [{"path": f"{ROOT}/tests/rewards_for_tests.py:length_divides_by_eight"}],
        "rollout": {"max_completion_length": 48},
        "scoring": {"workers": 1},
        "training": {"output_dir": "unused", "num_threads": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sizes = ["--pass-rate", "0.1..0.9", "--n", "8", "--chunk", "8"]
    return ["-m", "grpo", "data", "filter", str(folder / "recipe.yaml"), *sizes, "--output", str(folder / "rows.jsonl")]


def files(folder: Path) -> dict[str, bytes]:
    """Their bytes; the report names the folder."""
    found = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "recipe.yaml"}
    return {name: content.replace(str(folder).encode(), b"") for name, content in found.items()}


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    began = time.monotonic()
    done = run_python(*command(tiny_model, calm))
    assert done.returncode == 0, done.stderr
    seconds = time.monotonic() - began
    draw, sampling = random.Random(0), 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, *command(tiny_model, killed)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        samples = killed / "rows.samples.jsonl"
        before = samples.stat().st_size if samples.exists() else 0
        deadline = time.monotonic() + 3 * seconds + 60
        moment = draw.random()
        while process.poll() is None and time.monotonic() < deadline:
            if samples.exists() and samples.stat().st_size > before:
                time.sleep(moment * 0.3)
                break
            time.sleep(0.01)
        sampling += process.poll() is None
        process.kill()
        process.wait()
    assert sampling >= KILLS - 1, "killed while it sampled"
    done = run_python(*command(tiny_model, killed))
    assert done.returncode == 0, done.stderr
    assert "prompts are there already" in done.stderr
    assert files(killed) == files(calm)
