"""The labelled pairs: no wrong answer is accepted, and the right ones that are refused are known by name."""

from __future__ import annotations

import json
from pathlib import Path

from rewards.math import verify

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "math_labelled.jsonl").read_text().splitlines()]
# Right answers that are refused, on purpose: what would accept them would accept wrong ones too, or compute with units.
KNOWN_REFUSED = {
    ("50 \\text{ cents}", "\\boxed{\\$0.50}"): "units are compared, not converted",
    ("5 \\text{ km}", "\\boxed{5000 \\text{ m}}"): "units are compared, not converted",
    ("5", "\\boxed{\\text{five}}"): "number words are words",
    ("7", "\\boxed{x = \\frac{14}{2} = 7}"): "a chain of equations names several candidates",
}


def test_the_set_is_balanced():
    right = sum(pair["correct"] for pair in PAIRS)
    assert len(PAIRS) >= 300
    assert len({(pair["gold"], pair["completion"]) for pair in PAIRS}) == len(PAIRS)
    assert 0.4 < right / len(PAIRS) < 0.6


def test_no_wrong_answer_is_accepted_and_few_right_ones_are_refused():
    rewards = [verify(pair["gold"], pair["completion"], timeout=20.0).reward for pair in PAIRS]
    assert None not in rewards
    accepted = [pair for pair, reward in zip(PAIRS, rewards, strict=True) if reward == 1.0 and not pair["correct"]]
    refused = [
        (pair["gold"], pair["completion"])
        for pair, reward in zip(PAIRS, rewards, strict=True)
        if reward == 0.0 and pair["correct"]
    ]
    wrong = sum(not pair["correct"] for pair in PAIRS)
    print(f"FP {len(accepted)} of {wrong}, FN {len(refused)} of {len(PAIRS) - wrong}")
    assert accepted == []
    assert set(refused) == set(KNOWN_REFUSED)
