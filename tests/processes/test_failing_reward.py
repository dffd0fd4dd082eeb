"""A run goes on beside a reward function that fails, counts every failure, and learns from the other completions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.launching import ROOT, run_python
from tests.resuming import command, lines, weights

pytestmark = pytest.mark.timeout(600)

CAUSES = {"timeout", "error", "crashed", "not_finite"}


def train(model: Path, folder: Path, function: str) -> Counter[str]:
    """A short run with a function of ``rewards_that_fail.py``; its verdicts, added up."""
    short = ("training.max_steps=3", "training.eval_every=0", "evaluation.at_start=false", "data.eval_size=0")
    rewards = f"rewards=[{{path: '{ROOT}/tests/rewards_that_fail.py:{function}', timeout: 1.0}}]"
    batch = ("training.prompts_per_step=8", "rollout.num_generations=8")
    done = run_python(*command(model, folder, *short, *batch, rewards))
    assert done.returncode == 0, done.stderr
    counts: Counter[str] = Counter()
    for row in lines(folder):
        counts.update({key.rpartition("/")[2]: value for key, value in row.items() if key.startswith("verdicts/")})
    return counts


@pytest.mark.slow
def test_the_learning_signal_is_that_of_the_others(tiny_model: Path, tmp_path: Path) -> None:
    failing, calm = tmp_path / "failing", tmp_path / "calm"
    failures = train(tiny_model, failing, "failing")
    assert set(failures) == CAUSES, failures
    assert sum(failures.values()) == train(tiny_model, calm, "calm")["unscored"] > 10
    assert weights(failing) == weights(calm)
