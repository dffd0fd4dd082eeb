"""The rules of what is kept of a prompt's samples, each by itself, and their mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo.errors import UserError
from grpo.pipeline.keep import apply, expressions, parse_rules, pass_rate, thinking
from grpo.scoring.grade import Graded
from tests.conftest import make_recipe

REWARDS = [{"name": "countdown"}, {"name": "format", "weight": 0.0}, {"path": "mine.py:style", "weight": 0.0}]
RECIPE = make_recipe(Path("some/model"), rewards=REWARDS)


def group(*completions: dict[str, Any]) -> dict[str, Any]:
    base = {"text": "<think> 1 + 2 </think>", "tokens": 3, "countdown": 1.0, "format": 1.0, "style": 0.5}
    rows = [base | one for one in completions]
    return {
        "prefill": "",
        "completions": [
            {
                "text": row["text"],
                "token_ids": [0] * row["tokens"],
                "rewards": {name: row[name] for name in ("countdown", "format", "style")},
            }
            for row in rows
        ],
    }


def kept(keep: str, row: dict[str, Any], measures: dict[str, Any] | None = None) -> list[int]:
    rules = parse_rules(keep.split(","), RECIPE)
    return apply(rules, row, range(len(row["completions"])), measures or {})[-1]


def test_by_rewards() -> None:
    row = group({}, {"countdown": 0.0}, {"countdown": None}, {"format": 0.9}, {"style": 0.8})
    assert kept("correct", row) == [0, 3, 4]
    assert kept("well_formed", row) == [0, 1, 2, 4]
    assert kept("style>=0.8", row) == [4]
    assert kept("correct, well_formed", row) == [0, 4]


def test_by_the_prompts_pass_rate() -> None:
    row = group({}, {"countdown": 0.0}, {"countdown": None}, {})
    assert pass_rate(row, "countdown") == 2 / 3  # of those that could be scored
    assert kept("pass_rate=0.5..0.7", row) == [0, 1, 2, 3]
    assert kept("pass_rate=0.7..1", row) == []
    assert kept("pass_rate=0..1", group({"countdown": None})) == []


def test_the_shortest_of_those_left() -> None:
    row = group({"tokens": 9}, {"tokens": 4, "countdown": 0.0}, {"tokens": 7}, {"tokens": 7}, {"tokens": 5})
    assert kept("correct,shortest=2", row) == [2, 4]  # of two as short the first
    assert kept("shortest=1,correct", row) == []  # in the order given


def test_one_a_path_the_shortest() -> None:
    row = group(
        {"text": "<think> First 1 + 2. </think>", "tokens": 9},
        {"text": "<think>first 1+2</think> and more", "tokens": 5},
        {"text": "<think> now 1 + 2 </think>", "tokens": 7},
        {"text": "<think> 2 + 1 </think>", "tokens": 7},
    )
    assert kept("distinct", row) == [1, 2, 3]
    assert kept("distinct=expressions", row) == [1, 3]


def test_what_a_path_is() -> None:
    assert thinking("<think> So: 6 + 3 = 9! </think> <answer> x </answer>") == ("so", "6", "+", "3", "=", "9")
    assert thinking("no tags <answer> 3 </answer>") == ("no", "tags")
    trace = "<think> 6 + 3 = 9 , ( 9 - 2 ) * 3.5 = 24.5 ? 27 < 6 * 3 = 18 </think> <answer> 1 + 1 </answer>"
    assert expressions(trace) == ("6+3", "(9-2)*3.5", "6*3")
    assert expressions("4 5 + 6") == ("5+6",)
    assert expressions("step-by-step, 7") == thinking("step-by-step, 7")  # none, so its words
    assert expressions("1" * 20_000 + " (" * 20_000) == thinking("1" * 20_000 + " (" * 20_000)  # in linear time


def test_by_measures_beside_the_recipes_rewards() -> None:
    recipe = make_recipe(Path("some/model"))
    rules = {rule.text: rule for rule in parse_rules(["well_formed", "language=zh", "not_repetitive=4"], recipe)}
    form, language, repetition = (rules[text].measure for text in rules)
    assert form is not None
    assert language is not None
    assert repetition is not None
    assert (language.reward.name, language.reward.args) == ("language", {"language": "zh"})
    assert (repetition.reward.name, repetition.reward.args) == ("repetition", {"ngram_size": 4})
    assert [form.passes(Graded(value, word)) for value, word in ((1.0, "correct"), (0.0, "wrong"))] == [True, False]
    shares = ((0.95, "wrong"), (0.94, "wrong"), (0.0, "no_answer"), (None, "error"))
    assert [language.passes(Graded(value, word)) for value, word in shares] == [True, False, True, False]
    penalties = ((0.0, "correct"), (-0.1, "wrong"), (-0.11, "wrong"), (None, "error"))
    assert [repetition.passes(Graded(value, word)) for value, word in penalties] == [True, True, False, False]
    assert apply(list(rules.values())[:1], group({}, {}), [0, 1], {"well_formed": [False, True]}) == [[1]]


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("corect", "--keep corect: no such rule; there are correct, well_formed"),
        ("correct=1", "--keep correct=1: takes no value"),
        ("shortest", "--keep shortest: needs a number above 0 (how many a prompt), got ''"),
        ("shortest=0", "got '0'"),
        ("distinct=words", "write distinct, or distinct=expressions"),
        ("pass_rate=0.5", "write LOW..HIGH, such as 0.1..0.9"),
        ("pass_rate=0.9..0.1", "0.9..0.1 is no window within 0..1"),
        ("stile>=1", "the recipe has no reward 'stile' (there are countdown, format, style)"),
        ("style>=high", "'high' is no number"),
        ("", "no such rule"),
    ],
)
def test_a_rule_that_is_none_is_told(keep: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_rules([keep, "shortest=x"], RECIPE)
    assert said in str(refused.value)
    assert "--keep shortest=x" in str(refused.value)  # and all others with it
