"""The files of ``examples/``, each by the command that its docstring names, and each with a mistake in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, environment

pytestmark = pytest.mark.timeout(300)  # each starts a run, on machines of any speed
EXAMPLES = ROOT / "examples"
SMALL = [
    "rollout.num_generations=4",
    "rollout.max_completion_length=24",
    "data.eval_size=0",
    "scoring.workers=1",
    "training.prompts_per_step=2",
    "training.max_steps=1",
    "training.save_every=0",
    "training.num_threads=1",
]
MIXED = "rewards=[{path: mixed.py:by_place}]"  # every group has a signal


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grpo", "train", "smoke_cpu", *SMALL, "training.output_dir=run", *overrides]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=280)


def copied(folder: Path, name: str, old: str = "", new: str = "") -> None:
    """The example in ``folder``, with ``old`` made ``new``."""
    text = (EXAMPLES / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    (folder / "mixed.py").write_text(
        "def by_place(completions, **_): return [float(i) for i in range(len(completions))]"
    )


OVERRIDES = {
    "my_loss.py": ["algorithm.loss_type=my_loss.py:capped", MIXED],
    "my_reward.py": ["rewards=[{path: my_reward.py:near_target}]"],
    "my_task.py": ["data.name=my_task.py:build", "data.args={largest: 9}", "rewards=[{name: math}]"],
    "my_backend.py": ["rollout.backend=my_backend.py:PlainBackend", MIXED],
    "my_environment.py": [
        "environment={path: my_environment.py:Nearer, max_turns: 3, max_observation_length: 8}",
        "rewards=[{name: environment}]",
    ],
}
MEASURED = {
    "my_loss.py": "loss/capped_ratio",
    "my_reward.py": "rewards/near_target/logged/near_share",
    "my_task.py": "reward",
    "my_backend.py": "sampling/importance_sampling_ratio/mean",
    "my_environment.py": "completions/mean_turns",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OVERRIDES)
def test_an_example_trains(tmp_path, name):
    copied(tmp_path, name)
    done = train(tmp_path, *OVERRIDES[name])
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    (step,) = [row for row in rows if "reward" in row]
    assert MEASURED[name] in step
    if name == "my_backend.py":  # its log-probabilities are those of the policy that it samples
        assert 0 <= step["sampling/sampling_logp_difference/max"] < 1e-4
        assert step["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


MISTAKES = {
    "my_loss.py": (
        "return -weight_BT * tokens.advantages * tokens.logps_BT",
        "return tokens.ratio_BT.tanh().sum()",
        "algorithm.loss_type: my_loss.py:capped: it returned a tensor of shape (); expected a floating-point tensor of",
    ),
    "my_reward.py": (
        "def near_target(",
        "def near_targets(",
        "rewards[0] (my_reward.py:near_target): {}/my_reward.py has no 'near_target'; did you mean near_targets?",
    ),
    "my_task.py": (
        "from datasets import",
        "from dataset import",
        "data.name: {}/my_task.py:14: ModuleNotFoundError: No module named 'dataset'",
    ),
    "my_backend.py": (
        "Completion(ids, logps, status",
        "Completion(ids, logps[1:], status",
        "rollout.backend: my_backend.py:PlainBackend: generate: prompt ",
    ),
    "my_environment.py": (
        "def step(",
        "def steps(",
        "environment.path: my_environment.py:Nearer: {}/my_environment.py:18: Nearer.steps: the docstring does not",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_it_is_told_in_one_line(tmp_path, name):
    old, new, said = MISTAKES[name]
    copied(tmp_path, name, old, new)
    done = train(tmp_path, *OVERRIDES[name])
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(said.format(tmp_path)), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", OVERRIDES)
def test_its_docstring_has_the_command(name):
    docstring = (EXAMPLES / name).read_text().split('"""')[1].replace("examples/", "")
    assert "grpo train smoke_cpu" in docstring
    assert OVERRIDES[name][0] in docstring
