"""Runs of the tiny model in this process, with a backend that may fail at its n-th call: for tests of the loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from grpo import trainer
from grpo.backends import make_backend
from grpo.errors import BackendFailed
from grpo.run.folder import release_run_folder
from tests.conftest import make_recipe
from tests.launching import ROOT

TIMES = ("time/", "step_time", "tokens_per_second")


class CallsCounted:
    """The real hf backend. ``calls`` are what it was asked for: versions with prompt ids; the ``fails_at``-th fails."""

    def __init__(
        self, backend: Any, fails_at: int | None, calls: list[tuple[int, list[int]]], failure: type[Exception]
    ):
        self.backend, self.fails_at, self.calls, self.failure = backend, fails_at, calls, failure

    def generate(self, requests: Any, sampling: Any, version: int, on_group: Any = None) -> Any:
        if len(self.calls) == self.fails_at:
            raise self.failure("lost")
        self.calls.append((version, [request.prompt.id for request in requests]))
        return self.backend.generate(requests, sampling, version, on_group)

    def submit(self, requests: Any, sampling: Any, version: int) -> Any:
        """Sampled at once, by the policy that is asked: so that runs ahead repeat to the bit."""
        return self.generate(requests, sampling, version)

    def collect(self, flight: Any, on_group: Any = None) -> Any:
        return flight

    def sync(self, policy: Any, version: int) -> dict[str, float]:
        return self.backend.sync(policy, version)

    def close(self) -> None:
        self.backend.close()


def small_run(
    model: Path,
    folder: Path,
    patch: pytest.MonkeyPatch,
    /,
    *,
    fails_at: int | None = None,
    resume: bool = False,
    steps: int = 6,
    train_size: int = 24,
    reward: str = "length_divides_by_eight",
    failure: type[Exception] = BackendFailed,
    allow_changed_inputs: bool = False,
    **sections: Any,
) -> list[tuple[int, list[int]]]:
    """Train; returns the calls of the backend. ``sections`` of the recipe are merged over those here.

    With ``rollout: {backend: vllm, max_staleness: N}`` the hf backend stands for an engine that samples ahead.
    """
    base: dict[str, Any] = {
        "data": {"args": {"question": "compact"}, "train_size": train_size, "eval_size": 0, "max_prompt_length": 32},
        "rewards": [{"path": f"{ROOT}/tests/rewards_for_tests.py:{reward}"}],
        "rollout": {"num_generations": 4, "max_completion_length": 6},
        "scoring": {"workers": 1},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"output_dir": str(folder), "prompts_per_step": 4, "max_steps": steps, "num_threads": 1},
    }
    if "mix" in sections.get("data", {}):
        base["data"] = {"max_prompt_length": 32}  # its sources say the rest
    for name, content in sections.items():
        base[name] = base.get(name, {}) | content if isinstance(content, dict) else content
    calls: list[tuple[int, list[int]]] = []

    def make(recipe: Any, policy: Any) -> CallsCounted:
        on_hf = {"rollout": recipe.rollout.model_copy(update={"backend": "hf"})}
        return CallsCounted(make_backend(recipe.model_copy(update=on_hf), policy), fails_at, calls, failure)

    patch.setattr(trainer, "make_backend", make)
    patch.setattr(trainer, "check_engine", lambda rollout: None)  # no engine is started
    patch.setattr(trainer, "write_report_at_end", lambda folder: None)  # takes seconds
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    try:
        trainer.train(make_recipe(model, **base), resume, allow_changed_inputs=allow_changed_inputs)
    finally:
        release_run_folder(folder)
        torch.set_num_threads(threads)
    return calls


def lines(folder: Path) -> list[dict[str, Any]]:
    """Logged metrics without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "final/model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def progress(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds of a run's progress."""
    return torch.load(folder / f"checkpoints/step_{step:06d}/progress.pt", weights_only=True)
