"""`grpo sample`: rows whose supervised tokens are those that were sampled, and a report that adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from grpo.config import Recipe
from grpo.errors import RunError
from grpo.model.loading import load_tokenizer
from grpo.pipeline import generate as generate_module
from grpo.pipeline.generate import Wanted
from grpo.pipeline.keep import parse_rules
from grpo.pipeline.sample import lines, report_of, row_to_imitate, sample, samples_of, trained_on
from grpo.pipeline.sampled import read_samples, sample_row
from grpo.prompts.task import load_task
from grpo.types import Completion, Group, Status
from tests.conftest import make_recipe
from tests.launching import ROOT

BASE = ROOT / "data/tiny_base"
ARGS = {"question": "compact", "min_numbers": 3, "max_numbers": 3, "max_number": 9, "min_target": 1, "max_target": 60}
WANTED = Wanted(n=6, prompts=12)
KEEP = "correct,well_formed,language,not_repetitive,distinct,shortest=2"


def recipe_of(**sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "data": {"args": ARGS, "eval_size": 4, "max_prompt_length": 32},
        "rewards": [{"name": "countdown"}, {"name": "format", "weight": 0.0}],
        "rollout": {"max_completion_length": 96},
        "scoring": {"workers": 1},
        "training": {"output_dir": "unused", "prompts_per_step": 4, "num_threads": 1},
    }
    return make_recipe(BASE, **base | sections)


def run(keep: str, output: Path, **sections: Any) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = recipe_of(**sections)
    try:
        found = sample(recipe, WANTED, parse_rules(keep.split(","), recipe), output)
    finally:
        torch.set_num_threads(1)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("sampled") / "rows.jsonl"
    return output, run(KEEP, output)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_the_supervised_stage_trains_on_the_tokens_that_were_sampled(sampled: tuple[Path, dict[str, Any]]) -> None:
    output, report = sampled
    data = {"name": None, "path": str(output), "eval_size": 1}
    training = {"output_dir": "unused", "prompts_per_step": 1}
    recipe = make_recipe(BASE, stage="sft", rewards=[], data=data, training=training)
    task = load_task(recipe, load_tokenizer(recipe.model))
    samples = {group["prompt_id"]: group for group in read_samples(samples_of(output))}
    rows = rows_of(output)
    assert len(rows) == report["rows"] >= 4
    for place, row in enumerate(rows):
        group = samples[row["sampled"]["prompt_id"]]
        completion = group["completions"][row["sampled"]["sample"]]
        assert task.example(task.train, place) == (group["prompt_ids"], completion["token_ids"], None, ())
        assert completion["token_ids"][-1] == task.tokenizer.eos_token_id


def test_rows_say_where_they_come_from(sampled: tuple[Path, dict[str, Any]]) -> None:
    output, report = sampled
    for row in rows_of(output):
        assert row.keys() == {"nums", "target", "prompt", "completion", "sampled"}
        assert row["sampled"]["verdict"] == "correct"
        assert row["sampled"]["rewards"] == {"countdown": 1.0, "format": 1.0}
        assert 0 < row["sampled"]["pass_rate"] <= 1
        assert {key: row["sampled"][key] for key in ("model", "recipe", "seed")} == {
            key: report[key] for key in ("model", "recipe", "seed")
        }


def test_the_report_adds_up(sampled: tuple[Path, dict[str, Any]]) -> None:
    output, report = sampled
    groups = list(read_samples(samples_of(output)))
    solved = [[c["rewards"]["countdown"] == 1 for c in group["completions"]] for group in groups]
    assert report["completions"] == 72
    assert [step["rule"] for step in report["rules"]] == [
        *("ended", "correct", "well_formed", "language", "not_repetitive", "same_tokens", "distinct", "shortest=2")
    ]
    left = [step["completions"] for step in report["rules"]]
    assert left == sorted(left, reverse=True)
    assert left[1] == sum(map(sum, solved))  # of those that ended, and no other is right
    solved_prompts = report["rules"][1]["prompts"]
    assert report["rules"][-1] == {"rule": "shortest=2", "completions": report["rows"], "prompts": solved_prompts}
    assert sum(report["pass_rate"]["histogram"].values()) == 12
    assert report["pass_rate"]["histogram"]["0"] == sum(not any(of) for of in solved)
    assert report["pass_rate"]["mean"] == pytest.approx(sum(map(sum, solved)) / 72)
    assert sum(report["verdicts"].values()) == 72
    assert json.loads(report_of(output).read_text()) == report
    said = "\n".join(lines(report, output))
    assert f"{report['rows']} rows: {output}" in said


def test_other_rules_sample_nothing_again(
    sampled: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, report = sampled
    here = tmp_path / output.name
    for file in output.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(generate_module, "make_backend", None)  # nothing loads a model
    assert run(KEEP, here) == report
    assert here.read_bytes() == output.read_bytes()
    assert run("correct", here)["rows"] > report["rows"]
    here.unlink()
    with pytest.raises(RunError, match=r"pass_rate=0.99..0.995 leaves nothing of 72 completions"):
        run("pass_rate=0.99..0.995", here)
    assert not here.exists()
    assert json.loads(report_of(here).read_text())["rows"] == 0


def test_a_text_that_would_become_other_tokens_is_left_out(
    sampled: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is one that another token ended: the supervised stage would write the tokenizer's own."""
    output, _ = sampled
    here = tmp_path / output.name
    for file in output.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    groups = list(read_samples(samples_of(output)))
    tokenizer = load_tokenizer(recipe_of().model)
    right = [c for group in groups for c in group["completions"] if c["rewards"]["countdown"] == 1]
    spelt = right[0]["token_ids"]
    pieces = tokenizer.convert_ids_to_tokens(spelt)
    place = next(i for i, piece in enumerate(pieces) if piece.isdigit() and len(piece) == 2)
    first, second = pieces[place]
    spelt[place : place + 1] = tokenizer.convert_tokens_to_ids([first, f"##{second}"])
    assert tokenizer.decode(spelt, skip_special_tokens=True) == right[0]["text"]
    right[1]["token_ids"][-1] = tokenizer.pad_token_id
    samples_of(here).write_text("".join(json.dumps(group) + "\n" for group in groups))
    monkeypatch.setattr(generate_module, "make_backend", None)
    report = run("correct", here)
    assert [step["completions"] for step in report["rules"][-2:]] == [len(right), len(right) - 2]


def test_the_prefill_of_a_template_belongs_to_the_row() -> None:
    """``<think>``, with which the prompt ends: the row's completion is whole, and what is trained on was sampled."""
    data = {"args": ARGS, "template": "tinyzero", "eval_size": 4, "max_prompt_length": 500}
    recipe = recipe_of(data=data)
    task = load_task(recipe, load_tokenizer(recipe.model))
    prompt = task.train_prompts(0)[0]
    text = "<think> 1 + 2 = 3 </think> <answer> 1 + 2 </answer>"  # the model opens it once more
    tokens = task.encode_answer(text)
    completion = Completion(tokens, [0.0] * len(tokens), Status.STOP, text, [])
    group = Group(prompt, [completion], [1.0], {"countdown": [1.0]}, said={"countdown": ["correct"]})
    row = sample_row(group)
    assert trained_on(task, row, 0) == tokens
    assert row_to_imitate(row, 0, {}, "countdown")["completion"] == "<think>" + text
