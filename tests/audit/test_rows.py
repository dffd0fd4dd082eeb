"""Rows before a run: what ``grpo validate`` says of them."""

from __future__ import annotations

import pytest

from grpo.audit.rows import check_data
from grpo.errors import UserError
from grpo.scoring.scorer import Scorer
from tests.prompts.small_rows import questions, recipe, write_rows
from tests.prompts.word_problems import WRITTEN, from_templates


def test_check_data_needs_neither_tokenizer_nor_network(tmp_path):
    rows_file = write_rows(tmp_path / "rows.jsonl", questions(23))
    assert check_data(recipe({"path": rows_file, "eval_size": 3})) == ": 20 rows to train on, 3 held out"
    assert "checked when a run loads them" in check_data(recipe({"hub": "a/b"}))
    with pytest.raises(UserError, match="no such file"):
        check_data(recipe({"path": "nowhere.jsonl"}))


def test_rows_that_repeat_held_out_questions_are_said(tmp_path):
    """But not those of a template, nor in so few rows that templates can't be known."""
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"prompt": text} for text in WRITTEN])
    rows = [{"prompt": text} for text in [*from_templates(80), WRITTEN[6].replace("wide", "broad")]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    said = check_data(recipe({"path": path, "eval_path": held_out, "eval_size": 30}))
    assert f"1 of the 81 rows to train on repeat held-out questions: {path}:81 and {held_out}:7 share" in said
    assert "grpo data decontaminate ROWS --against EVALUATION" in said
    few = write_rows(tmp_path / "few.jsonl", rows[-10:])
    assert "repeat" not in check_data(recipe({"path": few, "eval_path": held_out, "eval_size": 30}))
    generated = recipe({"name": "countdown", "args": {"question": "compact"}, "train_size": 200, "eval_size": 100})
    assert "repeat" not in check_data(generated)


def test_a_source_of_a_mix_is_judged_by_its_own_rewards(tmp_path):
    one = write_rows(
        tmp_path / "one.jsonl", [{"prompt": f"{i} + 1", "nums": [i, 1], "target": i + 1} for i in range(9)]
    )
    two = write_rows(tmp_path / "two.jsonl", [{"prompt": f"{i} * 2 ?", "answer": str(i * 2)} for i in range(9)])
    mix = [
        {"path": one, "eval_size": 2, "rewards": [{"name": "countdown"}]},
        {"path": two, "eval_size": 0, "rewards": [{"name": "math"}]},
    ]
    made = recipe({"mix": mix}, rewards=[])
    with Scorer(made.functions(), made.scoring) as scorer:
        assert check_data(made, scorer) == ": 16 rows to train on, 2 held out"
    swapped = recipe(
        {"mix": [mix[0] | {"rewards": mix[1]["rewards"]}, mix[1] | {"rewards": mix[0]["rewards"]}]}, rewards=[]
    )
    with Scorer(swapped.functions(), swapped.scoring) as scorer, pytest.raises(UserError, match="of the rows of one"):
        check_data(swapped, scorer)
