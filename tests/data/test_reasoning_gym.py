"""data/reasoning_gym.py with the real package: every generator that is taken is scored right, splits share nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import reasoning_gym
from rewards import countdown, gsm8k, math
from rewards.verdict import Outcome

pytest.importorskip("reasoning_gym")
SLOW = ("puzzle24", "zebra_puzzles")  # tens of milliseconds a question


def test_every_generator_of_the_package_is_taken_or_refused_with_a_reason():
    from reasoning_gym.factory import DATASETS

    taken = [*reasoning_gym.NUMBERS, *reasoning_gym.TEXTS, *reasoning_gym.COUNTDOWN]
    refused = [name for names in reasoning_gym.REFUSED.values() for name in names]
    assert sorted(taken + refused) == sorted(DATASETS)


@pytest.mark.parametrize("generator", sorted((*reasoning_gym.NUMBERS, *reasoning_gym.TEXTS)))
def test_an_answer_is_right_and_another_one_is_not(generator):
    judge = gsm8k.verify if generator in reasoning_gym.NUMBERS else math.verify
    rows = reasoning_gym.build("eval", 4 if generator in SLOW else 12, 1, generator=generator).to_list()
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        plain, others = (r["answer"].removeprefix("#### ") for r in (row, other))
        assert judge(row["answer"], f"<answer>{plain}</answer>").outcome is Outcome.CORRECT, row
        if others != plain:
            assert judge(row["answer"], f"<answer>{others}</answer>").outcome is not Outcome.CORRECT, row


def test_a_question_can_not_be_copied_for_its_answer():
    (row,) = reasoning_gym.build("train", 1, generator="chain_sum", min_terms=3, max_terms=3).to_list()
    copied = row["prompt"].split(": ")[-1].removesuffix(" =")
    assert math.verify(row["answer"], f"<answer>{copied}</answer>").outcome is Outcome.CORRECT  # hence reward gsm8k
    assert gsm8k.verify(row["answer"], f"<answer>{copied}</answer>").outcome is Outcome.UNPARSEABLE


@pytest.mark.parametrize(("generator", "size"), [("countdown", 8), ("puzzle24", 2)])
def test_countdown_has_what_our_reward_needs(generator, size):
    import reasoning_gym as package

    rows = reasoning_gym.build("train", size, 0, generator=generator).to_list()
    items = package.create_dataset(generator, size=100, seed=0)
    answers = {item["question"]: item["answer"] for item in (items[i] for i in range(2 * size + 4))}
    for row in rows:
        assert all(str(number) in row["prompt"] for number in row["nums"])
        if row["prompt"] in answers:
            given = f"<answer>{answers[row['prompt']]}</answer>"
            assert countdown.verify(row["nums"], row["target"], given).outcome is Outcome.CORRECT, (row, given)
    assert any(row["prompt"] in answers for row in rows)


def test_the_splits_share_no_question_whatever_the_seed():
    train = reasoning_gym.build("train", 600, 0, generator="chain_sum", max_terms=3, max_digits=1)["prompt"]
    held_out = reasoning_gym.build("eval", 200, 5, generator="chain_sum", max_terms=3, max_digits=1)["prompt"]
    assert len(set(train)) == 600
    assert not set(train) & set(held_out)
    assert (
        reasoning_gym.build("train", 20, 0, generator="gcd").to_list()
        == (reasoning_gym.build("train", 60, 0, generator="gcd").to_list()[:20])
    )
    assert (
        reasoning_gym.build("train", 20, 0, generator="gcd")["prompt"]
        != (reasoning_gym.build("train", 20, 1, generator="gcd")["prompt"])
    )


def test_another_process_makes_the_same_rows():
    """Some generators iterate over sets of strings, whose order differs from process to process."""
    names = sorted({*reasoning_gym.NUMBERS, *reasoning_gym.TEXTS, "countdown"} - set(SLOW))
    script = (
        "import json, sys; from data import reasoning_gym as task\n"
        "print(json.dumps({name: task.build('train', 4, 2, generator=name).to_list() for name in sys.argv[1:]}))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script, *names],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert [name for name in names if first[name] != second[name]] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"generator": "sudoku"}, "sudoku can't be scored by comparing: several answers are right"),
        ({"generator": "fraction_simplification"}, "holds an expression as good as the answer"),
        ({"generator": "sums"}, "no 'sums'; there are aiw"),
        ({"generator": "gcd", "min_terms": 3}, "gcd refuses these settings"),
        ({"generator": "gcd", "min_numbers": 9, "max_numbers": 2}, "gcd refuses these settings"),
    ],
)
def test_what_can_not_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        reasoning_gym.build("train", 5, **arguments)


def test_too_few_questions_are_refused():
    with pytest.raises(ValueError, match=r"has given only \d+ distinct train questions, 3000 were asked for"):
        reasoning_gym.build("train", 3000, generator="chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)


def test_a_missing_package_is_said_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'grpo-train\[reasoning-gym\]'"):
        reasoning_gym.build("train", 5, generator="gcd")
