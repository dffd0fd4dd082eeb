"""`grpo train` as a process on a small recipe with a vLLM engine, and what such a run leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.launching import ROOT, environment, run_python
from tests.vllm_engine.conftest import SMALL_CACHE, TINY, ServerProcess, vllm_python


def recipe(folder: Path, base: Path = TINY, **sections: Any) -> Path:
    """Writes FOLDER.yaml: countdown questions and a reward that any model gets; ``sections`` are merged over it."""
    content: dict[str, Any] = {
        "model": {"name": str(base), "dtype": "float32"},
        "data": {
            "name": "countdown",
            "args": {"question": "compact", "min_numbers": 3, "max_numbers": 3, "max_number": 9, "max_target": 60},
            "eval_size": 4,
            "max_prompt_length": 32,
        },
        "rewards": [{"path": f"{ROOT}/tests/rewards_for_tests.py:share_of_small_numbers"}],
        "rollout": {"backend": "vllm", "num_generations": 4, "max_completion_length": 32},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"output_dir": str(folder), "prompts_per_step": 4, "max_steps": 3, "num_threads": 1},
        "evaluation": {"at_start": False},
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section if isinstance(section, dict) else section
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def colocated(**more: Any) -> dict[str, Any]:
    return {"vllm_python": vllm_python(), "vllm_args": SMALL_CACHE, **more}


def on(*servers: ServerProcess, **more: Any) -> dict[str, Any]:
    return {"vllm_mode": "server", "vllm_server_base_url": [s.url for s in servers], **more}


def train(path: Path, *more: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "grpo", "train", path, *more, timeout=timeout)


def start(path: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grpo", "train", str(path), *more]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def metrics(folder: Path, of: str = "reward") -> list[dict[str, Any]]:
    """The lines of training steps, which have this metric."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if of in row]


def rollouts(folder: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()]


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[str] | None = None, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        assert run is None or run.poll() is None, f"the run ended first: {run.communicate()}"
        time.sleep(0.05)
