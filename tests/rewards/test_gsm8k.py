"""GSM8K's verifier: numbers as people write them, and nothing that holds two of them."""

from __future__ import annotations

import pytest

from rewards.gsm8k import gsm8k_reward, verify
from rewards.verdict import Outcome

GOLD = "She sells 9 eggs at $2.\n9 * 2 = <<9*2=18>>18\n#### 18"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (GOLD, "18"),
        (GOLD, " $18 "),
        (GOLD, "18.00"),
        (GOLD, "18 dollars"),
        (GOLD, "+18"),
        ("#### 1,234", "1234"),
        ("#### 70000", "$70,000"),
        ("#### -3", "-3 degrees Celsius."),
        ("#### 25", "25%"),
        ("#### 0.5", "0.50"),
        ("#### 0.5", ".5"),
        ("#### .5", "0.5"),
        ("#### -5", "\u22125"),
        ("#### \u22125", "-5"),
        ("#### -5", "-$5"),
        (GOLD, "\\boxed{18}"),
        (GOLD, "$\\boxed{18}$"),
        (GOLD, "\\(\\boxed{\\$18}\\)"),
        (GOLD, "18 eggs"),
        (GOLD, "18 apples in total"),
        (GOLD, "18 miles per hour"),
        (GOLD, "18 times"),
        ("She has 8 gizmos and buys 10.\n#### 18", "18 gizmos"),
        ("#### 18000", "\\boxed{18{,}000}"),
    ],
)
def test_right(gold, answer):
    assert verify(gold, f"<think>so</think><answer>{answer}</answer>").outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("19", Outcome.WRONG),
        ("-18", Outcome.WRONG),
        ("18.01", Outcome.WRONG),
        ("1,8", Outcome.UNPARSEABLE),
        ("18 or 19", Outcome.UNPARSEABLE),
        ("9 * 2", Outcome.UNPARSEABLE),
        ("36/2", Outcome.UNPARSEABLE),
        ("1.8e1", Outcome.UNPARSEABLE),
        ("18k", Outcome.UNPARSEABLE),
        ("18 thousand", Outcome.UNPARSEABLE),
        ("18 Dozens", Outcome.UNPARSEABLE),
        ("0x12", Outcome.UNPARSEABLE),
        ("१८", Outcome.UNPARSEABLE),
        ("the answer is 18", Outcome.UNPARSEABLE),
        ("18 minus ten", Outcome.UNPARSEABLE),
        ("18 squared", Outcome.UNPARSEABLE),
        ("18 halves", Outcome.UNPARSEABLE),
        ("18 fifths", Outcome.UNPARSEABLE),
        ("18 or more", Outcome.UNPARSEABLE),
        ("18 is wrong", Outcome.UNPARSEABLE),
        ("18 lakh", Outcome.UNPARSEABLE),
        ("18 doubled", Outcome.UNPARSEABLE),
        ("18 less", Outcome.UNPARSEABLE),
        ("18 not", Outcome.UNPARSEABLE),
        ("18 gizmos", Outcome.UNPARSEABLE),  # neither known nor counted in the solution
        ("18 per", Outcome.UNPARSEABLE),
        ("18 of the", Outcome.UNPARSEABLE),
        ("-\\boxed{18}", Outcome.UNPARSEABLE),
        ("\\boxed{18}!", Outcome.UNPARSEABLE),
        ("\\boxed{17} \\boxed{18}", Outcome.UNPARSEABLE),
        ("--18", Outcome.UNPARSEABLE),
        (".", Outcome.UNPARSEABLE),
        ("9" * 10_000, Outcome.UNPARSEABLE),
        ("18 " + "a" * 10_000 + "!", Outcome.UNPARSEABLE),
        ("", Outcome.NO_ANSWER),
        ("18</answer><answer>19", Outcome.NO_ANSWER),
    ],
)
def test_not_right(answer, outcome):
    assert verify(GOLD, f"<think>so</think><answer>{answer}</answer>").outcome is outcome


def test_the_block_must_follow_the_thinking():
    assert verify(GOLD, "so <answer>18</answer>", prefill="<think>").outcome is Outcome.NO_ANSWER


def test_status_comes_first():
    assert verify(GOLD, "<answer>18</answer>", status="length").outcome is Outcome.TRUNCATED
    assert verify(GOLD, "<answer>18</answer>", status="error").reward is None


@pytest.mark.parametrize("gold", ["18", "#### ", "#### eighteen", "#### 18 or 19", None, 18])
def test_a_broken_gold_answer_scores_nobody(gold):
    verdict = verify(gold, "<answer>18</answer>")
    assert (verdict.outcome, verdict.reward) == (Outcome.GOLD_UNPARSEABLE, None)


def test_reward_function_has_one_entry_a_completion():
    completions = ["<answer>18</answer>", [{"role": "assistant", "content": "<answer>17</answer>"}], "18"]
    assert gsm8k_reward(["q"] * 3, completions, answer=[GOLD] * 3) == [1.0, 0.0, 0.0]
    assert gsm8k_reward(["q"], ["<answer>18</answer>"], answer=["none"]) == [None]
