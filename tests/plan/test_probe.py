"""`grpo probe`: each way to fail by name, healthy figures that pass, and real groups of the tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo.plan.findings import Figures, findings
from grpo.plan.probe import Probe
from grpo.plan.probe_text import WIDTH, lines, page
from tests.cli.conftest import run
from tests.launching import ROOT
from tests.plan.test_plan import planned

HEALTHY = Figures(
    groups=64, completions=512, with_signal=0.6, signal_low=0.48, signal_high=0.71, answer_signal=0.5, accuracy=0.2,
    accuracy_low=0.16, accuracy_high=0.24, pass_at_G=0.6, reward=0.25, cut_off=0.1, unique=0.9, unscored=0.0,
    mean_length=90.0,
    mean_prompt=20.0, entropy=0.4, sampler_difference=0.01, verdicts={"wrong": 0.7, "correct": 0.2}, seconds=3.0,
)  # fmt: skip
NOTHING = {"with_signal": 0.0, "signal_low": 0.0, "signal_high": 0.06, "accuracy": 0.0, "accuracy_low": 0.0}
WAYS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no_signal": (NOTHING | {"pass_at_G": 0.0}, []),
    "all_solved": ({"accuracy": 0.99, "accuracy_low": 0.97, "accuracy_high": 1.0}, []),
    "all_cut": ({"cut_off": 0.9}, []),
    "form_never_found": (NOTHING | {"verdicts": {"no_answer": 0.6, "unparseable": 0.38, "wrong": 0.02}}, []),
    "gold_of_another_type": ({}, ["rewards[0] (mine): the right answers of 16 rows get 0"]),
    "unscored": ({"unscored": 0.2}, []),
    "all_alike": ({"unique": 1 / 8}, []),
    "signal_of_the_form_alone": ({"accuracy": 0.01, "answer_signal": 0.02}, []),
    "sampler_mismatch": ({"sampler_difference": 0.2}, []),
}
NEAR = [
    {"accuracy": 0.96, "accuracy_low": 0.93},
    {"cut_off": 0.7},
    {"unscored": 0.04},
    {"unique": 0.25},
    {"sampler_difference": 0.08},
    {"verdicts": {"no_answer": 0.85, "correct": 0.05}},
    {"with_signal": 0.06, "signal_low": 0.02, "signal_high": 0.15},
]


def named(figures: Figures, unpaid: list[str] | None = None) -> set[str]:
    return {finding.name for finding in findings(figures, unpaid or [])}


@pytest.mark.parametrize("name", WAYS)
def test_a_recipe_that_will_not_learn_is_named(name: str) -> None:
    changes, unpaid = WAYS[name]
    assert name in named(replace(HEALTHY, **changes), unpaid)


@pytest.mark.parametrize("changes", [{}, *NEAR], ids=str)
def test_a_recipe_that_comes_near_goes(changes: dict[str, Any]) -> None:
    assert named(replace(HEALTHY, **changes)) == set()


def test_the_text_fits_80_columns_and_the_page_runs_nothing_of_a_completion() -> None:
    figures = replace(HEALTHY, verdicts={f"verdict_{i}": 0.1 for i in range(10)})
    row = {
        "prompt": "a<b",
        "completion": "<script>alert(1)</script>",
        "reward": None,
        "num_tokens": 3,
        "status": "stop",
    }
    probe = Probe(figures, findings(replace(HEALTHY, unscored=0.5), []), [row] * 20)
    assert max(map(len, list(lines(probe, "grpo plan x")))) <= WIDTH
    assert "<script>" not in page(probe, "a<b")


def test_what_a_run_takes_is_said_in_text_page_and_json() -> None:
    probe = Probe(HEALTHY, [], [], planned("countdown_qwen2.5-3b", "80gb"))
    text, shown, found = "\n".join(lines(probe, "grpo plan x")), page(probe, "x"), probe.as_json()["plan"]
    for said in ("memory", "a step", "the run", "It fits: ", "A100, 80 GB"):
        assert said in text
        assert said in shown
    assert max(map(len, text.splitlines())) <= WIDTH
    assert found["fits"] is True
    assert found["step_seconds"] > 0
    too_large = Probe(HEALTHY, [], [], planned("countdown_qwen2.5-3b", "24gb"))
    assert "n a machine with more memory" in page(too_large, "x")
    unknown = Probe(HEALTHY, [], [], no_plan="its kind is <not> known")
    assert "what it takes: its kind is <not> known." in " ".join("\n".join(lines(unknown, "grpo plan x")).split())
    assert "is &lt;not&gt; known" in page(unknown, "x")
    assert unknown.as_json()["plan"] is None


SMALL = ["--prompts", "8", "training.num_threads=1", "rollout.max_completion_length=48", "data.eval_size=8"]


@pytest.mark.slow
def test_a_recipe_that_learns_goes_and_says_what_it_found(tmp_path: Path) -> None:
    result = run("probe", "smoke_cpu", *SMALL, f"training.output_dir={tmp_path / 'run'}")
    assert result.exit_code == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "run/probe.json").read_text())
    assert found["goes"] is True
    assert found["groups"] == 8
    assert 0 < found["with_signal"] <= 1
    assert found["sampler_difference"] < 1e-4
    assert "grpo plan smoke_cpu" in result.stdout
    assert found["plan"]["lengths"]["completion"] == pytest.approx(found["mean_length"])
    assert found["plan"]["lengths"]["with_signal"] == found["with_signal"]
    assert found["plan"]["step_seconds"] > 0
    assert found["plan"]["hours"] > 0
    assert "It fits: " in result.stdout
    assert (tmp_path / "run/probe.html").exists()


@pytest.mark.slow
def test_a_recipe_without_signal_is_not_trained(tmp_path: Path) -> None:
    reward = f"rewards=[{{path: '{ROOT}/tests/rewards_for_tests.py:always_one'}}]"
    result = run("train", "smoke_cpu", *SMALL[2:], reward, f"training.output_dir={tmp_path / 'run'}", "--probe")
    assert result.exit_code == 3, result.stdout + result.stderr
    assert "all_solved" in result.stdout
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_supervised_recipe_has_nothing_to_probe() -> None:
    result = run("probe", "tiny_base_sft_cpu")
    assert result.exit_code == 2
    assert "nothing to sample" in result.stderr
