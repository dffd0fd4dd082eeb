"""rewards/similarity.py: 1 for the text itself, less for what is near, nothing for what is no answer."""

from __future__ import annotations

import pytest

from rewards.similarity import check_row, similarity_reward, verify
from rewards.verdict import Outcome

GOLD = ".revir eht ot"


def test_equal_near_and_far():
    assert verify(GOLD, f"<answer>{GOLD}</answer>").reward == 1.0
    assert verify(GOLD, f"<think>hm</think><answer> {GOLD}\n</answer>").outcome is Outcome.CORRECT
    near = verify(GOLD, "<answer>.rivir eht ot</answer>")
    assert near.outcome is Outcome.WRONG
    assert near.reward == pytest.approx(2 * 12 / 26)
    assert 0 < verify(GOLD, f"<answer>{GOLD[::-1]}</answer>").reward < 0.6
    assert verify(GOLD, "<answer>qqq</answer>").reward == 0.0


@pytest.mark.parametrize(
    "text", [GOLD, "", "<answer></answer>", f"<answer>{GOLD}</answer><answer>{GOLD}</answer>", f"<answer>{GOLD}"]
)
def test_what_is_not_one_answer_gets_nothing(text):
    assert verify(GOLD, text).reward == 0.0


def test_truncated_broken_and_endless():
    answered = f"<answer>{GOLD}</answer>"
    assert verify(GOLD, answered, status="length").reward == 0.0
    assert verify(GOLD, answered, status="error").reward is None
    assert verify("", answered).reward is None
    assert verify(7, answered).reward is None
    assert verify(GOLD, "<answer>" + GOLD * 100_000 + "</answer>").reward == 0.0
    assert similarity_reward(["q"] * 2, [answered, "no"], [GOLD] * 2) == [1.0, 0.0]
    assert check_row({"answer": GOLD}) is None
    assert "must be a text" in str(check_row({"answer": None}))
