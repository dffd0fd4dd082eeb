"""Rows before a run: what ``grpo validate`` says of them."""

from __future__ import annotations

import pytest

from grpo.audit.rows import check_data
from grpo.errors import UserError
from tests.prompts.small_rows import questions, recipe, write_rows


def test_check_data_needs_neither_tokenizer_nor_network(tmp_path):
    rows_file = write_rows(tmp_path / "rows.jsonl", questions(23))
    assert check_data(recipe({"path": rows_file, "eval_size": 3})) == ": 20 rows to train on, 3 held out"
    assert "checked when a run loads them" in check_data(recipe({"hub": "a/b"}))
    with pytest.raises(UserError, match="no such file"):
        check_data(recipe({"path": "nowhere.jsonl"}))
