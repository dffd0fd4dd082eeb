"""What a recipe expects of a run, and the best evaluation so far: row by row, and in real runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from grpo.config.expect import ExpectConfig
from grpo.errors import RunError
from grpo.health.bands import Bands
from grpo.health.best import Best
from tests.conftest import make_recipe
from tests.small_runs import small_run

BAND = {"metric": "eval/accuracy", "step": 50, "low": 0.35, "high": 0.55, "source": "three seeds"}


def test_a_band_is_judged_once_at_the_first_step_that_has_the_metric() -> None:
    bands = Bands([BAND])
    assert bands.see({"step": 50, "reward": 0.1}) == []
    assert bands.see({"step": 40, "eval/accuracy": 0.1}) == []
    (judgement,) = bands.see({"step": 60, "eval/accuracy": 0.21})
    assert judgement.text() == ("off track at step 60: eval/accuracy 0.210, expected 0.35 to 0.55 (three seeds)")
    assert bands.see({"step": 60, "eval/accuracy": 0.4}) == []
    assert not bands.judged[0].on_track


@pytest.mark.parametrize(("value", "on_track"), [(0.35, True), (0.55, True), (0.349, False), (0.551, False)])
def test_the_ends_belong_to_a_band(value: float, on_track: bool) -> None:
    (judgement,) = Bands([BAND]).see({"step": 50, "eval/accuracy": value})
    assert judgement.on_track is on_track


def test_a_band_upside_down_is_refused() -> None:
    with pytest.raises(ValueError, match=r"low \(0.6\) is above high \(0.55\)"):
        ExpectConfig.model_validate(BAND | {"low": 0.6})


def evaluations(metric: str, *values: float) -> Best:
    best = Best(metric)
    for step, value in enumerate(values):
        best.see({"step": step, metric: value})
        best.see({"step": step, "reward": 1.0})
    return best


def test_the_best_is_the_largest_or_the_smallest_loss() -> None:
    best = evaluations("eval/accuracy", 0.2, 0.4, 0.3, 0.4)
    assert (best.value, best.step, best.stale) == (0.4, 1, 2)
    best = evaluations("eval/loss", 2.0, 1.0, 1.5)
    assert (best.value, best.step, best.stale) == (1.0, 1, 1)


def test_patience_begins_anew_where_the_run_went_back() -> None:
    best = evaluations("eval/accuracy", 0.4, 0.3, 0.2)
    best.see({"step": 2, "rollback/to_step": 0.0})
    assert (best.value, best.step, best.stale, best.rollbacks) == (0.4, 0, 0, 1)


def test_a_metric_that_evaluation_does_not_have_is_named() -> None:
    with pytest.raises(RunError, match=r"training.save_best: eval/acuracy is not among .*\(eval/accuracy\)"):
        Best("eval/acuracy").see({"step": 0, "eval/accuracy": 0.2})


def test_patience_needs_something_to_be_patient_about(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set save_best"):
        make_recipe(tmp_path, training={"output_dir": str(tmp_path), "patience": 2})


@pytest.mark.slow
def test_a_run_keeps_its_best_model_and_ends_when_it_gets_no_better(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    training = {"output_dir": str(folder), "prompts_per_step": 4, "max_steps": 12, "num_threads": 1, "eval_every": 1}
    sections: dict[str, Any] = {
        "data": {"eval_size": 4},
        "training": training | {"save_best": "eval/completions/mean_length", "patience": 3},
        "expect": [{"metric": "eval/accuracy", "step": 1, "low": 2.0, "high": 3.0, "source": "nobody"}],
    }
    with caplog.at_level(logging.INFO, "grpo"):
        small_run(tiny_model, folder, monkeypatch, steps=12, **sections)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lengths = {row["step"]: row["eval/completions/mean_length"] for row in rows if "eval/accuracy" in row}
    last = max(lengths)
    best = max(lengths, key=lambda step: (lengths[step], -step))
    assert last < 12, "an untrained model's lengths do not grow for ever"
    assert last - best == 3
    assert (folder / f"checkpoints/step_{last:06d}").is_dir()
    assert (folder / "final").is_dir()
    assert (folder / "best").is_dir() == (best > 0)
    if best:
        card = (folder / "best/README.md").read_text()
        assert f"the run's best model by `eval/completions/mean_length`, that of step {best};" in card
        assert f"| after (step {best}) |" in card
    assert "off track at step 1: eval/accuracy" in caplog.text
