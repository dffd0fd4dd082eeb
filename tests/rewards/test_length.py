"""Shaping by length and repetition: the papers' formulas, and what must not pay."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.cosine import UnknownVerifier, cosine_reward, score, start
from rewards.length import cosine_between, repeated_share, soft_overlong_punishment, units_of
from rewards.overlong import overlong_reward
from rewards.overlong import verify as verify_overlong
from rewards.repetition import repetition_reward
from rewards.repetition import verify as verify_repetition
from rewards.verdict import Outcome

RIGHT, WRONG = "<answer>1 + 2</answer>", "<answer>1 - 2</answer>"
ROW = {"nums": [[1, 2]], "target": [3]}


# --- overlong ---


@pytest.mark.parametrize(
    ("length", "punishment"), [(0, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1), (30000, -1)]
)
def test_equation_13_of_dapo(length, punishment):
    assert soft_overlong_punishment(length, 20480, 4096) == pytest.approx(punishment)


@given(st.integers(0, 500), st.integers(1, 200), st.integers(1, 200))
def test_longer_is_never_punished_less(length, limit, cache):
    cache = min(cache, limit)
    assert (
        -1 <= soft_overlong_punishment(length + 1, limit, cache) <= soft_overlong_punishment(length, limit, cache) <= 0
    )


def test_cut_off_is_punished_in_full_and_never_finished_has_no_reward():
    limits = {"max_completion_length": 100, "soft_punish_cache": 50}
    assert verify_overlong(40, status="length", **limits).reward == -1
    assert verify_overlong(40, status="length", **limits).outcome is Outcome.TRUNCATED
    assert verify_overlong(40, status="error", **limits).reward is None
    ids = [[0] * 50, [0] * 75, [0] * 75]
    assert overlong_reward(["p"] * 3, ["c"] * 3, ids, ["stop", "stop", "length"], **limits) == [0.0, -0.5, -1.0]
    assert overlong_reward(["p"] * 3, ["c"] * 3, ids, **limits) == [0.0, -0.5, -0.5]  # TRL tells no status
    assert math.copysign(1, verify_overlong(0, **limits).reward) == 1


@pytest.mark.parametrize(("limit", "cache"), [(100, 0), (100, 101), (100, -1)])
def test_impossible_limits_are_refused(limit, cache):
    with pytest.raises(ValueError, match="soft_punish_cache"):
        soft_overlong_punishment(1, limit, cache)


# --- cosine ---


def test_ends_and_middle_of_the_cosine():
    assert cosine_between(0, 100, 1.0, 0.5) == 1.0
    assert cosine_between(50, 100, 1.0, 0.5) == pytest.approx(0.75)
    assert cosine_between(100, 100, 1.0, 0.5) == cosine_between(1000, 100, 1.0, 0.5) == 0.5


@given(st.integers(0, 99), st.integers(0, 99))
def test_right_beats_wrong_beats_cut_off_at_any_length(one, other):
    right, wrong = (score(correct, one, max_completion_length=100) for correct in (True, False))
    assert score(True, other, max_completion_length=100) > wrong
    assert (
        right
        > score(False, other, max_completion_length=100)
        >= score(True, one, max_completion_length=100, status="length")
    )
    if one < other:
        assert right > score(True, other, max_completion_length=100)
        assert wrong < score(False, other, max_completion_length=100)


@pytest.mark.parametrize(
    "values",
    [
        {"max_value_wrong": 0.5},
        {"min_value_wrong": -0.1},
        {"max_value_correct": 0.2},
        {"value_truncated": 0.0},
        {"max_completion_length": 0},
    ],
)
def test_ranges_that_would_pay_for_wrong_answers_are_refused(values):
    with pytest.raises(ValueError, match=r"value|max_completion_length"):
        score(True, 1, **{"max_completion_length": 100} | values)


def test_cosine_reward_asks_its_verifier():
    told = []
    values = cosine_reward(
        prompts=["p"] * 4,
        completions=[RIGHT, WRONG, RIGHT, RIGHT],
        completion_ids=[[0] * 50, [0] * 50, [0] * 50, [0] * 50],
        status=["stop", "stop", "length", "error"],
        verifier="countdown",
        max_completion_length=100,
        nums=[[1, 2]] * 4,
        target=[3] * 4,
        prefill=[""] * 4,
        log_verdict=told.extend,
    )
    assert values == [pytest.approx(0.75), pytest.approx(-0.75), -1.0, None]
    assert [verdict.outcome.value for verdict in told] == ["correct", "wrong", "truncated", "error"]


def test_a_broken_row_has_no_reward_and_without_a_status_the_limit_is_the_end():
    common = {"prompts": ["p"], "completions": [RIGHT], "verifier": "countdown", "max_completion_length": 10}
    assert cosine_reward(completion_ids=[[0]], nums=[None], target=[3], **common) == [None]
    assert cosine_reward(completion_ids=[[0] * 10], **ROW, **common) == [-1.0]
    assert cosine_reward(completion_ids=[[0] * 9], **ROW, **common)[0] > 0.5


@pytest.mark.parametrize("verifier", ["", "cosine", "nothing", "tags", "os.path", "../x"])
def test_unknown_verifiers_are_refused_before_the_first_step(verifier):
    with pytest.raises(UnknownVerifier, match="verifier"):
        start(1, verifier=verifier)


# --- repetition ---


def test_repeated_share():
    assert repeated_share([], 3) == repeated_share([1, 1], 3) == repeated_share([1, 2, 3, 4], 3) == 0
    assert repeated_share([1] * 12, 3) == pytest.approx(0.9)
    assert repeated_share("abcabc", 3) == pytest.approx(1 / 4)


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_saying_it_all_again_is_never_cheaper(units, size):
    assert 0 <= repeated_share(units, size) < 1
    assert repeated_share(units * 2, size) >= repeated_share(units, size)


def test_repetition_counts_tokens_or_else_words():
    loop, fine = "so we try again and " * 10, "one two three four five six"
    by_word = repetition_reward(["p"] * 2, [loop, fine], ngram_size=3)
    assert by_word[0] < -0.8
    assert by_word[1] == 0
    by_token = repetition_reward(["p"] * 2, ["a" * 99, fine], [[7] * 99, [1, 2, 3, 4]], ngram_size=3, max_penalty=-0.5)
    assert by_token == [pytest.approx(-0.5 * 96 / 97), 0.0]
    assert verify_repetition([1], status="error").reward is None


@pytest.mark.parametrize("values", [{"ngram_size": 0}, {"max_penalty": 0.1}])
def test_repeating_cannot_be_paid(values):
    with pytest.raises(ValueError, match="max_penalty"):
        verify_repetition([1, 2], **values)


@given(st.text())
def test_words_of_any_text(text):
    units = units_of(text)
    assert all(units)
    assert repeated_share(units, 2) >= 0


def test_scripts_without_spaces_are_counted_by_character():
    assert units_of("我们 ab,c ไทย") == ["我", "们", "ab", ",", "c", "ไ", "ท", "ย"]
    assert units_of("안녕 việt") == ["안녕", "việt"]
