"""Evaluations beside each other: the paired test on the rows of both, and what can't be compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from grpo.cli.main import app
from grpo.errors import UserError
from grpo.evaluation.statistics import accuracy_metrics
from grpo.report.compare_page import write_comparison
from grpo.report.compare_suites import read_evaluation, write_evaluations
from grpo.run.evaluations import write_evaluation
from tests.conftest import make_recipe
from tests.report.made_runs import make_run


def made(
    folder: Path, solved: list[int], name: str = "m", suite: str = "sums", template: str = "{}", **facts: Any
) -> Path:
    """An evaluation of a question a value of ``solved``, of two samples each."""
    values = [[float(i < count) for i in range(2)] for count in solved]
    rows = [
        {"prompt_id": p, "sample": g, "prompt": template.format(f"q{p}"), "status": "stop", "rewards": {"math": value}}
        for p, found in enumerate(values)
        for g, value in enumerate(found)
    ]
    recipe = make_recipe(Path("unused"), rewards=[{"name": "math"}], evaluation={"num_generations": 2})
    metrics = accuracy_metrics(np.array(values) >= 1, [f"q{p}" for p in range(len(values))])
    said = {"suite": suite, "rows": {"sha256": "same"}} | facts
    return write_evaluation(folder, name, recipe, name, metrics, rows, suite=suite, facts=said)


def test_two_models_on_a_suite_whatever_their_templates(tmp_path: Path) -> None:
    one = made(tmp_path, [0] * 10 + [1] * 4, "one")
    other = made(tmp_path, [1] * 10 + [0] * 4, "other", template="<user>{}</user>")
    result = CliRunner().invoke(app, ["compare", str(one), str(other), "--out", str(tmp_path / "c.html")])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("sums: ")]
    assert "sums: A 0.143 [" in line
    assert "B does better than A on 10 of 14 questions and worse on 4: +0.214 [" in line
    assert "p = 0.18, which may be chance." in line
    assert "worse on 4" in (tmp_path / "c.html").read_text()


def test_rows_that_are_not_the_same_are_compared_by_their_text_or_not_at_all(tmp_path: Path) -> None:
    one = made(tmp_path, [2, 0, 1], "one")
    same_text = made(tmp_path, [0, 0, 1], "two", rows={"sha256": "another"})
    no_text = made(tmp_path, [0, 0, 1], "three", template="Q: {}", rows={"sha256": "another"})
    assert "worse on 1" in "\n".join(write_evaluations([one, same_text], tmp_path / "c.html"))
    said = "\n".join(write_evaluations([one, no_text], tmp_path / "c.html"))
    assert "No test: they were not evaluated on the same rows." in said


def test_folders_of_evaluations_suite_by_suite(tmp_path: Path) -> None:
    for folder, solved in (("a", [0, 1, 2]), ("b", [2, 2, 2])):
        made(tmp_path / folder, solved)
        made(tmp_path / folder, solved, suite="more")
    lines = write_evaluations([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html")
    assert [line.split(":")[0] for line in lines if "does better" in line] == ["sums", "more"]


def test_runs_show_the_newest_of_their_suites(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps=2, every=2, tasks=12, seed=0) for name in ("one", "two")]
    recipe = runs[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "optimizer: {learning_rate: 0.1}\n")
    old = made(runs[0] / "eval", [2, 2, 2], "old")
    os.utime(old, (1, 1))
    made(runs[0] / "eval", [0, 0, 0], "new")
    made(runs[1] / "eval", [2, 0, 0], "new")
    lines = write_comparison(runs, tmp_path / "c.html")
    (line,) = [line for line in lines if line.startswith("sums: ")]
    assert "on 1 of 3 questions and worse on 0" in line


def test_mistakes(tmp_path: Path) -> None:
    one, other = made(tmp_path, [1]), made(tmp_path, [1], suite="other")
    with pytest.raises(
        UserError, match=r"m-sums.json \(sums\) and .*m-other.json \(other\) were evaluated on no suite"
    ):
        write_evaluations([one, other], tmp_path / "c.html")
    with pytest.raises(UserError, match="two evaluations or more"):
        write_evaluations([one], tmp_path / "c.html")
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"x.json: no evaluation of grpo eval"):
        read_evaluation(tmp_path / "x.json")
    one.with_suffix(".jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"m-sums.jsonl: not the samples of an evaluation"):
        read_evaluation(one)
    one.with_suffix(".jsonl").unlink()
    with pytest.raises(UserError, match=r"m-sums.jsonl: the samples of m-sums.json cannot be read"):
        read_evaluation(one)
    run = make_run(tmp_path / "run", steps=2, every=2, tasks=12, seed=0)
    result = CliRunner().invoke(app, ["compare", str(other), str(run)])
    assert result.exit_code == 2
    assert "is a run folder, and others are evaluations" in result.output
