r"""data/math.py: the gold answer of each source's columns, and that nothing evaluated on is trained on."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import math as math_data
from rewards.math import verify
from rewards.verdict import Outcome


def write(path, rows) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# One row in the form of each source.
MATH = {
    "problem": "What is $\\frac12+1$?",
    "level": "Level 3",
    "type": "Algebra",
    "solution": "It is \\boxed{2}, no: $\\boxed{\\frac{3}{2}}$.",
}
MATH500 = {
    "problem": "A point?",
    "solution": "\\boxed{x}",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}
MATH8K = {
    "prompt": [{"role": "user", "content": "<|im_start|>user\nHow many?<|im_end|>"}],
    "level": 4,
    "answer": "42",
    "extra_info": {"question": "How many?", "answer": "42", "index": 0, "split": "train"},
}
AIME2025 = {"problem_idx": 1, "problem": "Find $m+n$.", "answer": 70}


@pytest.mark.parametrize(
    ("row", "problem", "answer"),
    [
        (MATH, "What is $\\frac12+1$?", "\\frac{3}{2}"),
        (MATH500, "A point?", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        (MATH8K, "How many?", "42"),
        (AIME2025, "Find $m+n$.", "70"),
    ],
)
def test_the_columns_of_each_source(tmp_path, row, problem, answer):
    train, held_out = write(tmp_path / "a.parquet", [row]), write(tmp_path / "b.jsonl", [{"problem": "p", "answer": 1}])
    rows = math_data.build("train", path=train, eval_path=held_out).to_list()
    assert rows == [{"prompt": problem, "answer": answer}]
    assert verify(answer, f"so $\\boxed{{{answer}}}$").outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a \} brace}}", r"\text{a \} brace}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 5$.", "5"),
        (r"\boxed {x^{2^{3}}}", "x^{2^{3}}"),
    ],
)
def test_the_last_balanced_box(solution, answer):
    assert math_data.last_boxed(solution) == answer


@pytest.mark.parametrize("solution", ["no box", r"\boxed{1} and \boxed{\frac{1}{2}", r"\boxed{\}"])
def test_a_broken_box_is_no_answer(solution):
    with pytest.raises(ValueError, match="boxed"):
        math_data.last_boxed(solution)


def test_nothing_held_out_is_trained_on(tmp_path):
    problems = [{"problem": f"problem  {i}\n", "answer": str(i)} for i in range(10)]
    write(tmp_path / "train.jsonl", problems)
    write(
        tmp_path / "math500.jsonl", [{"problem": "problem 3", "answer": "3"}, {"problem": " problem 4", "answer": "4"}]
    )
    write(tmp_path / "aime2024.jsonl", [{"problem": "problem 5", "answer": "5"}])

    def answers(split, **arguments):
        return list(math_data.build(split, path=str(tmp_path), **arguments)["answer"])

    assert answers("eval") == ["3", "4"]
    assert answers("train") == ["0", "1", "2", "5", "6", "7", "8", "9"]
    assert answers("eval", eval="aime2024") == ["5"]
    assert answers("train", eval="aime2024") == [
        "0",
        "1",
        "2",
        "6",
        "7",
        "8",
        "9",
    ]  # MATH-500 is kept apart all the same
    with pytest.raises(ValueError, match="nothing is left to train on"):
        math_data.build("train", path=str(tmp_path / "math500.jsonl"), eval_path=str(tmp_path / "math500.jsonl"))


def test_one_file_needs_to_know_what_is_held_out(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"problem": "p", "answer": "1"}])
    with pytest.raises(ValueError, match="Give eval_path too"):
        math_data.build("train", path=path)


def test_levels_and_the_words_of_the_question(tmp_path):
    rows = [{"problem": f"{{level}} {i}", "level": f"Level {i}", "answer": str(i)} for i in range(1, 6)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", [{"problem": "other", "level": "Level 1", "answer": "1"}])
    hard = math_data.build("train", path=str(tmp_path), levels=[3, 4, 5], question="boxed")
    assert hard["answer"] == ["3", "4", "5"]
    assert hard["prompt"][0] == ("{level} 3\nPlease reason step by step, and put your final answer within \\boxed{}.")
    with pytest.raises(ValueError, match="too long: nothing is left"):
        math_data.build("train", path=str(tmp_path), max_characters=3)
    assert math_data.build("eval", path=str(tmp_path), levels=[3])["answer"] == ["1"]  # levels are for training


def test_rows_without_an_answer_are_named_or_left_out_with_a_warning(tmp_path, caplog):
    path = write(tmp_path / "train.jsonl", [{"problem": f"p{i}", "answer": "" if i == 2 else str(i)} for i in range(4)])
    arguments = {"path": path, "eval_path": write(tmp_path / "e.jsonl", [{"problem": "e", "answer": "1"}])}
    with pytest.raises(ValueError, match=rf"1 of 4 rows in .*\n  {path}:3: no answer: the column is empty"):
        math_data.build("train", **arguments)
    assert math_data.build("train", **arguments, skip_unsound=True)["answer"] == ["0", "1", "3"]
    assert re.search(rf"1 of 4 rows in .* are left out:\n  {path}:3", caplog.text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train": "aime2024"}, "train is one of math, math8k"),
        ({"eval": "math"}, "eval is one of math500"),
        ({"question": "x"}, "question is one of plain, boxed"),
        ({"path": "nowhere"}, "nowhere: is one file|nowhere"),
    ],
)
def test_senseless_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        math_data.build("train", **arguments)


def test_without_a_network_the_message_says_what_to_give():
    with pytest.raises(ValueError, match=r"HuggingFaceH4/MATH-500: .* give data\.args\.path: a folder"):
        math_data.build("eval")
