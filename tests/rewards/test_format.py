"""The format's verifier: one way to be right, and the ways in which others let it be faked."""

from __future__ import annotations

import pytest

from rewards.format import format_reward, verify
from rewards.verdict import Outcome

GOOD = "<think>let me see</think>\n<answer>42</answer>"


@pytest.mark.parametrize(
    ("completion", "prefill"),
    [
        (GOOD, ""),
        (f"\n {GOOD} \n", ""),
        ("<think>one line</think><answer>42</answer>", ""),
        ("let me see</think> <answer>42</answer>", "<think>"),
        ("many\nlines\n</think>\n\n<answer>\n42\n</answer>\n", " <think>\n"),
    ],
)
def test_right(completion, prefill):
    assert verify(completion, prefill=prefill).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    ("completion", "prefill"),
    [
        ("", ""),
        ("42", ""),
        (GOOD, "<think>"),
        (GOOD + " and more", ""),
        (GOOD + "\njunk", ""),
        ("Sure! " + GOOD, ""),
        (GOOD + GOOD, ""),
        (GOOD + "<answer>43</answer>", ""),
        ("<think><think>a</think></think><answer>42</answer>", ""),
        ("<think>a <answer>42</answer></think>", ""),
        ("<think>a <answer>41</answer></think><answer>42</answer>", ""),
        ("<think></think><answer>42</answer>", ""),
        ("<think> \n </think><answer>42</answer>", ""),
        ("<think>a</think><answer></answer>", ""),
        ("<think>a</think><answer> \n</answer>", ""),
        ("</think><answer>42</answer>", "<think>"),
        ("<answer>42</answer><think>a</think>", ""),
        ("<think>a</think> so <answer>42</answer>", ""),
        ("<think>a</answer><answer>42</think>", ""),
        ("<think>a</think><answer>42", ""),
        ("<think>a<answer>42</answer>", ""),
        ("<THINK>a</THINK><ANSWER>42</ANSWER>", ""),
        ("<think >a</think><answer>42</answer>", ""),
        ("<think>" * 20_000, ""),
    ],
)
def test_wrong(completion, prefill):
    verdict = verify(completion, prefill=prefill)
    assert verdict.outcome is Outcome.WRONG
    assert verdict.detail


def test_truncated_is_worth_nothing_and_a_failed_completion_has_no_reward():
    assert verify(GOOD, status="length").outcome is Outcome.TRUNCATED
    assert verify(GOOD, status="length").reward == 0
    assert verify(GOOD, status="error").reward is None


def test_reward_function_has_the_signature_of_trl():
    rewards = format_reward(
        prompts=["p"] * 3,
        completions=["a</think><answer>1</answer>", [{"role": "assistant", "content": GOOD}], "no"],
        prefill=["<think>", "", ""],
        completion_ids=[[1]] * 3,
        nums=[[1]] * 3,
    )
    assert rewards == [1.0, 1.0, 0.0]
