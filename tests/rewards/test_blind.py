"""Pairs and programs written from mathematics and from what models write by somebody who had not read the code.

They are kept as they were first run. What that run got wrong is named here; docs/results/rewards.md has the counts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rewards.code import verify as verify_program
from rewards.math import verify
from rewards.sandbox import Limits

HERE = Path(__file__).parent
# Right answers that are refused: two outside of a box and of <answer>, another writing of p.m., and a row's answer with
# two powers side by side, which is told before a run.
REFUSED = {r"\frac{7}{3}", r"\text{(E)}", r"3:45 \text{ p.m.}", r"-\frac{1}{2}", "2^5 3^4"}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


@pytest.mark.slow
def test_no_wrong_answer_is_paid_and_few_right_ones_are_refused() -> None:
    paid = [(row, verify(row["gold"], row["completion"]).reward == 1) for row in rows("math_blind.jsonl")]
    assert [row for row, right in paid if right and not row["correct"]] == []
    refused = [row["gold"] for row, right in paid if row["correct"] and not right]
    assert set(refused) <= REFUSED
    assert len(refused) <= len(REFUSED)


def as_tests(row: dict[str, Any]) -> dict[str, Any]:
    """As the code reward takes them. Assertions call the function by its name."""
    kind, tests = row["tests"]["kind"], row["tests"]
    if kind != "assert":
        return {"fn_name": tests.get("fn_name"), "inputs": tests["inputs"], "outputs": tests["outputs"]}
    name = re.match(r"assert\s+\(?(\w+)\(", tests["tests"][0].strip())[1]  # type: ignore[index]
    lines = [f"    {line.replace(f'{name}(', 'candidate(')}" for line in tests["tests"]]
    return {"fn_name": name, "test": "\n".join(["def check(candidate):", *lines, ""])}


@pytest.mark.slow
def test_programs_are_judged_right() -> None:
    wrong = []
    for row in rows("programs_blind.jsonl"):
        verdict = verify_program(as_tests(row), row["completion"], limits=Limits(10.0))
        if (verdict.reward == 1) != row["correct"]:
            wrong.append(row["why"])
    assert wrong == ["MBPP few-shot [BEGIN]/[DONE] markers"], "those have no fence, and no <answer>"
