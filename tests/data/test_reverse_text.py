"""data/reverse_text.py: sentences and their reversals, no sentence in both splits."""

from __future__ import annotations

import pytest

from data import reverse_text
from rewards.similarity import verify


def test_rows_are_solved_by_what_they_imitate():
    for row in reverse_text.rows("train", 200, 3):
        text = row["prompt"].rpartition("\n")[2]
        assert row["answer"] == text[::-1]
        assert text[0].isupper()
        assert text.endswith(".")
        assert verify(row["answer"], row["completion"]).reward == 1.0
        assert verify(row["answer"], f"<answer>{text}</answer>").reward < 0.6, "a copy is not near"


def test_splits_share_nothing_and_rows_do_not_depend_on_size():
    train = {row["answer"] for row in reverse_text.rows("train")}
    held_out = {row["answer"] for row in reverse_text.rows("eval", None, 5)}
    assert len(train) == reverse_text.DEFAULT_SIZE["train"]
    assert not train & held_out
    assert reverse_text.rows("train", 5, 1) == reverse_text.rows("train", 9, 1)[:5] != reverse_text.rows("train", 5, 2)
    lengths = [len(row["answer"]) for row in reverse_text.rows("train", 300, clauses=4)]
    assert max(lengths) > 200 > 90 > min(lengths)


@pytest.mark.parametrize("arguments", [{"split": "test"}, {"clauses": 0}, {"clauses": True}, {"clauses": 7}])
def test_arguments_without_sense_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        reverse_text.rows(**{"split": "train", "size": 3, **arguments})
