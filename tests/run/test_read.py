"""A run folder read back: every line once, an unfinished last line left out, what is wrong said by file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo.errors import UserError
from grpo.run.read import headline, read_jsonl, read_run


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_metrics_recipe_and_environment_are_read_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 2, "reward": 0.5, "kl": None},
        {"step": 1, "reward": 0.25},
        {"step": 2, "eval/accuracy": 0.75},
    ]
    record = read_run(write(tmp_path / "demo", *rows))
    assert [row["step"] for row in record.training] == [1, 2]
    assert [row["step"] for row in record.evaluation] == [0, 2]
    steps, values = record.series("reward")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [0.25, 0.5])
    assert record.series("kl")[0].tolist() == []
    assert record.names() == ["reward", "kl", "eval/accuracy"]
    assert record.names("eval/") == ["eval/accuracy"]
    assert (record.name, record.steps, record.recipe, record.environment) == ("demo", 2, {}, {})

    (tmp_path / "demo" / "recipe.yaml").write_text("tracking: {run_name: other}\nrollout: {temperature: 0.5}\n")
    (tmp_path / "demo" / "environment.json").write_text('{"host": "here"}')
    record = read_run(tmp_path / "demo")
    assert (record.name, record.environment) == ("other", {"host": "here"})
    assert (record.setting("rollout.temperature"), record.setting("rollout.top_p", 1.0)) == (0.5, 1.0)


def test_held_out_completions_are_found_by_step(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1, "reward": 0.0})
    (tmp_path / "rollouts").mkdir()
    for name in ("eval_000010.jsonl", "eval_000002.jsonl", "step_000001.jsonl", "eval_000002.jsonl.tmp"):
        (tmp_path / "rollouts" / name).touch()
    assert [(step, path.name) for step, path in read_run(tmp_path).eval_rollouts().items()] == [
        (2, "eval_000002.jsonl"),
        (10, "eval_000010.jsonl"),
    ]


def test_a_line_that_comes_twice_counts_once(tmp_path: Path) -> None:
    rows = [{"step": 1, "step_time": 1.0}, {"step": 2, "step_time": 1.0}, {"step": 2, "step_time": 3.0}]
    assert headline(read_run(write(tmp_path, *rows)))["seconds"] == 4.0


def test_the_headline_is_first_against_last_and_has_only_what_was_measured(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": s, "reward": s / 40, "num_tokens": 100 * s} for s in range(1, 41)]
    rows += [{"step": s, "eval/accuracy": a, "eval/completions/mean_length": 50 + s} for s, a in ((0, 0.2), (40, 0.6))]
    facts = headline(read_run(write(tmp_path, *rows)))
    assert facts == {
        "steps": 40.0,
        "accuracy_before": 0.2,
        "accuracy_after": 0.6,
        "length_before": 50.0,
        "length_after": 90.0,
        "reward_before": np.mean([1 / 40, 2 / 40]),  # 5% of the steps
        "reward_after": np.mean([39 / 40, 40 / 40]),
        "tokens": 4000.0,
    }


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    assert list(read_jsonl(tmp_path / "metrics.jsonl")) == [{"step": 1, "reward": 0.5}]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such run folder$"):
        read_run(tmp_path / "nowhere")
    write(tmp_path / "runs" / "smoke", {"step": 1})
    (tmp_path / "runs" / "smoke" / "final").mkdir()
    (tmp_path / "runs" / "not_a_run").mkdir()
    run = re.escape(str(tmp_path / "runs" / "smoke"))
    with pytest.raises(UserError, match=f"no such run folder, did you mean {run}\\?$"):
        read_run(tmp_path / "runs" / "smok")
    with pytest.raises(UserError, match=f"no such run folder; there are {run}$"):
        read_run(tmp_path / "runs" / "demo")
    with pytest.raises(UserError, match=f"is a file, and not a run folder; it is of the run {run}$"):
        read_run(tmp_path / "runs" / "smoke" / "metrics.jsonl")
    with pytest.raises(UserError, match=f"no metrics\\.jsonl in it\\); it is of the run {run}$"):
        read_run(tmp_path / "runs" / "smoke" / "final")
    with pytest.raises(UserError, match=f"no metrics\\.jsonl in it\\); runs inside it: {run}$"):
        read_run(tmp_path / "runs")
    with pytest.raises(UserError, match="smoke_cpu: is a recipe, and not a run folder; a run lies where"):
        read_run(Path("smoke_cpu"))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty: the run has not finished its first step"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of JSON"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"reward": 1}\n')
    with pytest.raises(UserError, match=r'metrics\.jsonl:1: .*no integer "step"'):
        read_run(tmp_path)
