"""``grpo data filter``: which rows are left, and why each of the others is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from grpo.cli.main import app
from grpo.errors import RunError
from grpo.pipeline.decontaminate import dropped_of, report_of
from grpo.pipeline.filter import Window, filter_rows
from grpo.pipeline.sample import samples_of
from tests.conftest import make_recipe
from tests.launching import ROOT
from tests.prompts.small_rows import write_rows

LUCK = {"path": f"{ROOT}/tests/rewards_for_tests.py:length_divides_by_eight"}


@pytest.fixture(autouse=True)
def _a_process_of_its_own() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(1)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def rows_file(folder: Path) -> str:
    rows = [{"prompt": f"{i} + {i + 3} = ", "nums": [i, i + 3], "target": 2 * i + 3} for i in range(1, 25)]
    rows += [
        {"prompt": "4 + 7  =", "nums": [4, 7], "target": 28},  # 25: row 4 again, with another answer
        {"prompt": "1 + 1 = ", "nums": [], "target": 99},  # 26: nothing gives that
        {"prompt": "5 + 5 + " * 12 + "5 = ", "nums": [5, 5], "target": 10},  # 27: too long
    ]
    return write_rows(folder / "rows.jsonl", rows)


def recipe_of(model: Path, path: str, **sections: Any) -> Any:
    base: dict[str, Any] = {
        "data": {"name": None, "path": path, "eval_size": 0, "max_prompt_length": 16},
        "rewards": [LUCK, {"name": "countdown", "weight": 0.1}],
        "rollout": {"num_generations": 4, "max_completion_length": 6},
        "scoring": {"workers": 1},
        "training": {"output_dir": "unused", "prompts_per_step": 4, "num_threads": 1},
    }
    return make_recipe(model, **(base | sections))


def test_without_sampling(tiny_model: Path, tmp_path: Path) -> None:
    path, output = rows_file(tmp_path), tmp_path / "left.jsonl"
    report = filter_rows(recipe_of(tiny_model, path), None, output)
    assert report is not None
    assert report["dropped"] == {"overlong": 1, "gold": 1, "duplicate": 1, "near": 0, "pass_rate": 0, "unscored": 0}
    assert read(output) == read(Path(path))[:24]
    again, gold, long = read(dropped_of(output))
    assert (again["row"], again["of"], again["differs_in"]) == (f"{path}:25", f"{path}:4", ["target"])
    assert (gold["row"], gold["rule"]) == (f"{path}:26", "gold")
    assert (long["row"], long["rule"]) == (f"{path}:27", "overlong")
    assert json.loads(report_of(output).read_text()) == report
    assert not samples_of(output).exists()


@pytest.mark.slow
def test_pass_rates_are_those_of_the_samples(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, output = rows_file(tmp_path), tmp_path / "left.jsonl"
    recipe = recipe_of(tiny_model, path)
    report = filter_rows(recipe, Window(0.25, 0.75, n=4, chunk=8), output)
    samples = read(samples_of(output))
    assert len(samples) == 24
    rates = {
        group["prompt"]: sum(c["rewards"]["length_divides_by_eight"] for c in group["completions"]) / 4
        for group in samples
    }
    kept = read(output)
    assert {row["prompt"]: row["pass_rate"] for row in kept} == {p: r for p, r in rates.items() if 0.25 <= r <= 0.75}
    assert 0 < len(kept) < 24
    gone = [row for row in read(dropped_of(output)) if row["rule"] == "pass_rate"]
    assert len(gone) == 24 - len(kept) == report["dropped"]["pass_rate"]
    assert report["sampled"]["never_right"] == sum(rate == 0 for rate in rates.values())

    made, before = samples_of(output).read_bytes(), output.read_bytes()
    monkeypatch.setattr("grpo.pipeline.generate._sample", None)  # nothing is sampled again
    filter_rows(recipe, Window(0.25, 0.75, n=4), output)
    assert (samples_of(output).read_bytes(), output.read_bytes()) == (made, before)
    wider = filter_rows(recipe, Window(0.0, 1.0, n=4), output)
    assert wider["kept"] == 24
    with pytest.raises(RunError, match=r"no row of 27 is left; pass_rate takes 24"):
        filter_rows(recipe, Window(0.3, 0.4, n=4), output)


@pytest.mark.slow
def test_each_source_of_a_mix_has_its_own_file_and_judge(tiny_model: Path, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": f"{i} + 2 = ", "a": i} for i in range(6)])
    two = write_rows(tmp_path / "two.jsonl", [{"question": f"{i} * 3 = ", "b": i} for i in range(6)])
    always = {"path": f"{ROOT}/tests/rewards_for_tests.py:always_one"}
    mix = [
        {"path": one, "eval_size": 0, "rewards": [LUCK]},
        {"path": two, "eval_size": 0, "rewards": [always], "prompt_column": "question"},
    ]
    data = {"mix": mix, "max_prompt_length": 16}
    output = tmp_path / "left.jsonl"
    report = filter_rows(recipe_of(tiny_model, one, data=data, rewards=[]), Window(1.0, 1.0, n=2), output)
    assert report["by_source"]["two"] == {"rows": 6, "kept": 6}
    assert [row["b"] for row in read(tmp_path / "left.two.jsonl")] == list(range(6))
    assert len(read(tmp_path / "left.one.jsonl")) == report["by_source"]["one"]["kept"] < 6
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pass-rate", "0.1"], "--pass-rate: write LOW..HIGH, such as 0.1..0.9"),
        (["--pass-rate", "0.9..0.1"], "is no window within 0..1"),
        (["--output", "rows.csv"], "rows go into a file that ends in .jsonl"),
        (["--pass-rate", "0..1", "stage=sft", "rewards=[]"], "--pass-rate needs rewards"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["data", "filter", "smoke_cpu", *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("command", [["sample"], ["data", "filter"]])
def test_rows_never_go_over_those_that_they_are_made_from(command: list[str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 + 2 = ", "answer": "3"}])
    before = Path(rows).read_bytes()
    data = f"data={{path: {rows}, eval_size: 0}}"
    result = CliRunner().invoke(app, [*command, "smoke_cpu", data, "--output", str(rows)])
    assert result.exit_code == 2
    assert f"--output {rows}: is what the rows are read from" in result.output
    assert Path(rows).read_bytes() == before
