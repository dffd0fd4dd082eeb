"""Notation of books, data sets and models, a line each in math_formats.txt: verdict, a row's answer, an answer."""

from __future__ import annotations

from pathlib import Path

from rewards.math import verify

FILE = Path(__file__).parent / "math_formats.txt"


def test_every_line_has_its_verdict() -> None:
    lines = [line.split(" || ") for line in FILE.read_text("utf-8").splitlines()]
    assert len(lines) > 400
    faults = []
    for verdict, gold, answer in lines:
        completion = answer if any(mark in answer for mark in ("boxed", "<answer>", "####")) else f"\\boxed{{{answer}}}"
        if verify(gold, completion, timeout=20.0).reward != float(verdict == "right"):
            faults.append((verdict, gold, answer))
    assert faults == []
