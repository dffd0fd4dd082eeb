"""Notation of books, data sets and models, line by line: math_formats.txt has the verdict, a row's answer, an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewards.math import verify

FILE = Path(__file__).parent / "math_formats.txt"
LINES = [tuple(line.split(" || ")) for line in FILE.read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("verdict", "gold", "answer"), LINES, ids=range(len(LINES)))
def test_a_line(verdict: str, gold: str, answer: str) -> None:
    completion = answer if any(mark in answer for mark in ("boxed", "<answer>", "####")) else f"\\boxed{{{answer}}}"
    assert verify(gold, completion, timeout=20.0).reward == float(verdict == "right"), (gold, answer)
