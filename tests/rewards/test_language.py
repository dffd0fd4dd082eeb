"""Language consistency: shares of words by script, and what does not count as one."""

# ruff: noqa: RUF001

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.language import SCRIPTS, language_reward, verify
from rewards.verdict import Outcome


@pytest.mark.parametrize(
    ("language", "text", "share"),
    [
        ("en", "<think>Let me see.</think><answer>It is 42!</answer>", 1.0),
        ("en", "Let me see 因此 it", 4 / 6),
        ("en", "Сначала we add", 2 / 3),
        ("en", "naïve don't Straße", 1.0),
        ("en", "the angle α and π", 1.0),
        ("en", "ψυχή is soul", 2 / 3),
        ("en", "𝑥 plus ｙ", 1.0),
        ("zh", "我们来看 $x + y$ 和 `foo(bar)` 与 \\frac{1}{2}", 1.0),
        ("zh", "我们 see", 2 / 3),
        ("zh", "$因此 x$ ok", 2 / 3),
        ("ja", "東京タワーです", 1.0),
        ("ko", "안녕하세요 여러분", 1.0),
        ("hi", "हिन्दी में सोचो abc", 3 / 4),
        ("ru", "так как x равно", 3 / 4),
        ("ar", "مَرْحَبًا بالعالم", 1.0),
    ],
)
def test_share(language, text, share):
    assert verify(text, language).reward == pytest.approx(share)


@pytest.mark.parametrize(
    "text", ["", "1 + 2 = 3", "<think></think><answer></answer>", "$x$ `y` \\alpha", "🙂 ！", "α β"]
)
def test_without_words_there_is_nothing_to_pay(text):
    verdict = verify(text)
    assert (verdict.outcome, verdict.reward) == (Outcome.NO_ANSWER, 0)


def test_what_is_hidden_in_formulas_or_outside_of_the_thinking_still_counts():
    assert verify("<think>fine</think><answer>因此</answer>").reward < 1
    assert verify("fine $因此$ `因此` \\(因此\\)").reward < 1


def test_truncated_is_worth_nothing_and_a_failed_completion_has_no_reward():
    assert verify("fine", status="length").reward == 0
    assert verify("fine", status="error").reward is None


def test_unknown_language():
    with pytest.raises(ValueError, match="one of en, de"):
        verify("a", "klingon")


@given(st.text(st.characters(categories=None)), st.sampled_from(sorted(SCRIPTS)))
def test_any_text_has_a_share(text, language):
    assert 0 <= verify(text, language).reward <= 1


@pytest.mark.parametrize("text", ["`", "$", "```a", "$a", "\\(", "\\[a", "``", "$$ ", "é", "ﷺ"])
def test_no_text_takes_long(text):
    start = time.perf_counter()
    verify(text * 50_000)
    assert time.perf_counter() - start < 5


def test_reward_function_has_the_signature_of_trl():
    completions = ["fine", [{"role": "assistant", "content": "好"}]]
    assert language_reward(["p"] * 2, completions, completion_ids=[[1]] * 2) == [1.0, 0.0]
    assert language_reward(["p"] * 2, completions, language="zh") == [0.0, 1.0]
