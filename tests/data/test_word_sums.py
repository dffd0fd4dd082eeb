"""data/word_sums.py and its traces: the sums are right, the splits share none, a third of the answers is worked out."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from data import tiny, word_sum_traces, word_sums
from rewards.math import verify
from rewards.verdict import Outcome


def told(question: str) -> int:
    """The answer, read from the story by other means than those that wrote it."""
    has, *events = question.removesuffix(" . how many ?").split(" , ")
    total = int(re.search(r"has (\d+)", has)[1])
    for event in events:
        numbers = [int(n) for n in re.findall(r"\d+", event)]
        amount = numbers[0] * numbers[1] if "boxes of" in event else numbers[0]
        total += amount if event.split()[0] in ("finds", "gets", "buys") else -amount
    return total


@pytest.mark.parametrize("arguments", [{}, {"events": 3, "largest": 20, "most": 80}, {"events": 1}])
def test_answers_are_those_of_the_stories(arguments):
    rows = word_sums.build("train", 300, 1, **arguments).to_list()
    assert [row["answer"] for row in rows] == [str(told(row["prompt"])) for row in rows]
    assert len({row["prompt"] for row in rows}) == 300
    assert all(0 <= int(row["answer"]) <= arguments.get("most", 30) for row in rows)


def test_steps_are_true_and_lead_to_the_answer():
    for story in islice(word_sums.word_sums("eval", 0), 200):
        for step in story.steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)  # our own text, not a model's
        assert story.steps[-1].endswith(f"= {story.answer}")


def test_no_sum_is_in_both_splits_whoever_owns_what():
    train = {story.key for story in islice(word_sums.word_sums("train", 0), 3000)}
    held_out = {story.key for story in islice(word_sums.word_sums("eval", 5), 600)}
    assert len(held_out) > 300
    assert not train & held_out


def test_rows_depend_on_seed_and_not_on_size():
    short, long = word_sums.build("train", 20, 3).to_list(), word_sums.build("train", 200, 3).to_list()
    assert long[:20] == short
    assert word_sums.build("train", 20, 4).to_list() != short
    traces = [word_sum_traces.build("train", size, 3).to_list() for size in (20, 200)]
    assert traces[1][:20] == traces[0]


def test_a_sum_is_a_few_tokens_and_none_is_unknown():
    tokenizer = tiny.build_tokenizer(word_sums.WORDS)
    for row in word_sum_traces.build("train", 300, 0).to_list():
        prompt, completion = (tokenizer.encode(row[column]) for column in ("prompt", "completion"))
        assert len(prompt) <= 24
        assert len(completion) <= 40
        assert tokenizer.unk_token_id not in prompt + completion
        assert tokenizer.decode(prompt) == row["prompt"]
        assert tokenizer.decode(completion) == row["completion"]


def test_diligence_is_mixed_and_what_is_worked_out_is_right():
    stories, draw = list(islice(word_sums.word_sums("train", 0), 1000)), random.Random(0)
    traces = [word_sum_traces.trace(story, draw) for story in stories]
    right = [verify(str(s.answer), trace).outcome is Outcome.CORRECT for s, trace in zip(stories, traces, strict=True)]
    worked_out = ["about" not in trace for trace in traces]
    assert sum(worked_out) / 1000 == pytest.approx(1 - sum(word_sum_traces.HASTE), abs=0.05)
    assert all(right[i] for i in range(1000) if worked_out[i])
    guessed_right = sum(right[i] for i in range(1000) if not worked_out[i]) / worked_out.count(False)
    assert 0.02 < guessed_right < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"events": 0}, "events is an integer from 1 to 5"),
        ({"largest": True}, "largest is an integer"),
        ({"most": 5}, "most is an integer from 9"),
        ({"size": 10**6, "events": 1}, r"only \d+ distinct train stories, 1000000 were asked for"),
        ({"split": "test"}, "split is train or eval"),
    ],
)
def test_senseless_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        word_sums.build(**{"split": "train", "size": 5, **arguments})


@pytest.mark.parametrize("wrong", [{"haste": (0.7, 0.7)}, {"haste": (0.5,)}, {"spread": 0}])
def test_senseless_traces_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        word_sum_traces.build("train", 5, 0, **wrong)
