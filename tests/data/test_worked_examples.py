"""data/worked_examples.py: the traces' search, in text that a pretrained tokenizer spends few tokens on."""

from __future__ import annotations

import re

import pytest

from data import traces, worked_examples
from rewards import countdown, format

TASK = re.compile(r"(\d+) (\d+) (\d+) = (\d+)")


def test_a_trace_becomes_one_line_an_attempt() -> None:
    trace = (
        "<think> 6 + 3 = 9 , 9 + 9 = 18 ? 27 < 9 * 6 = 54 , 54 + 3 = 57 ? 27 > 6 * 3 = 18 , 18 + 9 = 27 ? 27 yes "
        "</think> <answer> ( 6 * 3 ) + 9 </answer>"
    )
    assert worked_examples.plain_text(trace) == (
        "<think>6+3=9, 9+9=18, 27? low\n9*6=54, 54+3=57, 27? high\n6*3=18, 18+9=27, 27? yes\n</think>\n"
        "<answer>(6*3)+9</answer>"
    )


def test_examples_say_what_the_traces_say() -> None:
    ours = worked_examples.build("eval", 50, seed=3, give_up=(0.5,), longest=4)
    theirs = traces.build("eval", 50, seed=3, give_up=(0.5,), longest=4)
    assert ours["prompt"] == theirs["prompt"]
    for our, their in zip(ours["completion"], theirs["completion"], strict=True):
        assert re.findall(r"\d+", our) == re.findall(r"\d+", their)
        assert our.count("low") == their.count(" < ")
        assert our.count("high") == their.count(" > ")


def test_every_example_has_the_format_and_says_yes_exactly_where_the_answer_is_right() -> None:
    rows = worked_examples.build("train", 300, seed=0).to_list()
    said_yes = []
    for row in rows:
        assert format.verify(row["completion"]).outcome.value == "correct"
        *nums, target = map(int, TASK.fullmatch(row["prompt"]).groups())
        right = countdown.verify(nums, target, row["completion"]).outcome.value == "correct"
        assert right == ("yes" in row["completion"])
        said_yes.append(right)
    assert 0.1 < sum(said_yes) / len(rows) < 0.6  # of mixed diligence: neither hopeless nor done


def test_ranges_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="min_number"):
        worked_examples.build("train", 1, min_number=9, max_number=3)
