"""The graded form: full marks exactly where the strict one passes, less by every fault, nothing for repeating tags."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rewards.format import TAGS, format_reward, graded, verify
from rewards.verdict import Outcome

GOOD = "<think>let me see</think>\n<answer>42</answer>"
PIECES = st.one_of(
    st.sampled_from([*TAGS, " ", "\n", "\x1c", "\u00a0", "a", "42", "<", ">", "think", "</", "<ANSWER>"]),
    st.text(max_size=3),
)
TEXTS = st.lists(PIECES, max_size=14).map("".join)
PREFILLS = st.sampled_from(["", "<think>", " <think>\n", "<think>well", "Sure. <think>", "<think></think>", "<answer>"])


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("", 0.0),
        ("42", 0.0),
        ("<THINK>a</THINK><ANSWER>42</ANSWER>", 0.0),
        ("<think>a", 0.1),
        ("<answer>42</answer>", 0.2),
        ("<answer>42</answer><think>a</think>", 0.4),
        ("<think></think><answer></answer>", 0.6),
        ("<think>a</think><answer></answer>", 0.8),
        ("<think></think><answer>42</answer>", 0.8),
        ("<think>a</think> so <answer>42</answer>", 0.9),
        (GOOD + " and more", 0.9),
        (GOOD, 1.0),
        (GOOD + "</answer>", 0.3),
        (GOOD + GOOD, 0.0),
        ("<think></think><answer></answer>" * 50, 0.0),
        ("<think>" + GOOD, 0.3),
    ],
)
def test_points(completion, score):
    assert graded(completion).reward == pytest.approx(score)


def test_tags_of_the_prefill_earn_nothing():
    assert graded("", prefill="<think>").reward == 0
    assert graded("a</think><answer>1</answer>", prefill="<think>").reward == 1
    assert graded("a</think>", prefill="<think>").reward == pytest.approx(1 / 9)
    assert graded(GOOD, prefill="<think>").reward == pytest.approx(2 / 9)  # opened twice


def test_truncated_is_worth_nothing_and_a_failed_completion_has_no_reward():
    assert graded(GOOD, status="length").reward == 0
    assert graded(GOOD, status="error").reward is None


@given(TEXTS, PREFILLS)
@example(GOOD, "")
@example("a</think><answer>1</answer>", "<think>")
@example("<think>\x1c</think><answer>1</answer>", "")
def test_full_marks_exactly_where_the_strict_form_passes(completion, prefill):
    strict, parts = verify(completion, prefill=prefill), graded(completion, prefill=prefill)
    assert 0 <= parts.reward <= 1
    assert (parts.reward == 1) == (strict.outcome is Outcome.CORRECT)
    assert parts.outcome is strict.outcome


@given(TEXTS, st.sampled_from(TAGS), st.integers(0, 100))
def test_one_more_of_a_tag_that_is_there_always_costs(completion, tag, place):
    if completion.count(tag) == 1:
        place = min(place, len(completion))
        more = completion[:place] + tag + completion[place:]
        others = [other for other in TAGS if other != tag]
        # Put inside another tag, it breaks that one, which may be for the better.
        if more.count(tag) == 2 and all(more.count(other) == completion.count(other) for other in others):
            assert graded(more).reward < graded(completion).reward


@given(st.lists(st.sampled_from([*TAGS, "x"]), max_size=40).map("".join))
def test_no_arrangement_of_tags_beats_one_proper_use(completion):
    if verify(completion).outcome is not Outcome.CORRECT:
        assert graded(completion).reward < graded(GOOD).reward


def test_reward_function_takes_the_recipes_argument():
    completions = [GOOD, "<think>a", "no"]
    assert format_reward(["p"] * 3, completions) == [1.0, 0.0, 0.0]
    assert format_reward(["p"] * 3, completions, graded=True) == [1.0, 0.1, 0.0]
