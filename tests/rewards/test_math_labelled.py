"""The labelled pairs: no wrong answer is accepted, and the right ones that are refused are known by name.

Two sets: those of MATH's dialect, and ``"set": "formats"``, pairs in what people and models really write, of one kind
each (``why``). Both are reported beside math-verify alone, in the same run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import math_verify
import pytest

from rewards.math import verify

ROWS = [json.loads(line) for line in (Path(__file__).parent / "math_labelled.jsonl").read_text().splitlines()]
PAIRS = {
    "dialect": [row for row in ROWS if "set" not in row],
    "formats": [row for row in ROWS if row.get("set") == "formats"],
}
# Right answers that are refused, on purpose: what would accept them would accept wrong ones too, or compute with units.
KNOWN_REFUSED = {
    ("50 \\text{ cents}", "\\boxed{\\$0.50}"): "units are compared, not converted",
    ("5 \\text{ km}", "\\boxed{5000 \\text{ m}}"): "units are compared, not converted",
    ("5", "\\boxed{\\text{five}}"): "number words are words",
    ("7", "\\boxed{x = \\frac{14}{2} = 7}"): "a chain of equations names several candidates",
}


def test_the_sets_are_balanced():
    assert sum(map(len, PAIRS.values())) == len(ROWS)
    assert len(PAIRS["dialect"]) >= 1000
    assert len(PAIRS["formats"]) >= 300
    assert len({(row["gold"], row["completion"]) for row in ROWS}) == len(ROWS)
    for pairs in PAIRS.values():
        assert 0.4 < sum(pair["correct"] for pair in pairs) / len(pairs) < 0.65
    kinds = Counter(pair["why"] for pair in PAIRS["formats"])
    assert min(kinds.values()) >= 8, kinds


def faults(pairs: list[dict[str, Any]], judge: Callable[[str, str], bool]) -> tuple[list[Any], list[Any]]:
    """Wrong answers that are accepted, right ones that are refused: gold and completion."""
    judged = [(pair, judge(pair["gold"], pair["completion"])) for pair in pairs]
    accepted = [(pair["gold"], pair["completion"]) for pair, right in judged if right and not pair["correct"]]
    refused = [(pair["gold"], pair["completion"]) for pair, right in judged if not right and pair["correct"]]
    return accepted, refused


def ours(gold: str, completion: str) -> bool:
    reward = verify(gold, completion, timeout=20.0).reward
    assert reward is not None, gold
    return reward == 1.0


def math_verifys(gold: str, completion: str) -> bool:
    """math-verify as its documentation uses it: a bare gold answer is given as LaTeX."""
    parsed = math_verify.parse(gold if "$" in gold or "\\boxed" in gold else f"${gold}$")
    return bool(math_verify.verify(parsed, math_verify.parse(completion)))


@pytest.mark.parametrize(("name", "may_refuse"), [("dialect", len(KNOWN_REFUSED)), ("formats", 5)])
def test_no_wrong_answer_is_accepted_and_few_right_ones_are_refused(name: str, may_refuse: int) -> None:
    accepted, refused = faults(PAIRS[name], ours)
    wrong = sum(not pair["correct"] for pair in PAIRS[name])
    print(f"{name}: FP {len(accepted)} of {wrong}, FN {len(refused)} of {len(PAIRS[name]) - wrong}")
    assert accepted == []
    assert len(refused) <= may_refuse, refused
    assert set(refused) <= set(KNOWN_REFUSED)


@pytest.mark.slow
def test_math_verify_alone_on_the_formats() -> None:
    pairs = PAIRS["formats"][::6]  # benchmarks/math_rewards.py takes them all
    accepted, refused = faults(pairs, math_verifys)
    wrong = sum(not pair["correct"] for pair in pairs)
    print(f"math-verify alone: FP {len(accepted)} of {wrong}, FN {len(refused)} of {len(pairs) - wrong}")
    assert accepted  # what this set is for
    assert refused
