"""What a worker says, as JSON and back."""

from __future__ import annotations

import math

import pytest

from grpo.scoring.messages import Answer, BrokenContract, Failure, Garbled, NotLoaded, Ready, Signature, decode, encode


@pytest.mark.parametrize(
    "message",
    [
        Ready([Signature(True, False, ["nums"]), Signature(False, True, [])]),
        Ready([]),
        NotLoaded([None, "a.py:1: ZeroDivisionError"]),
        Answer([1.0, None]),
        Answer([0.5], ["correct"], ["so"], {"m": [1.0, math.inf]}, {"c": [{"a": [1, "\ud800", None]}]}),
        Failure("error", "Traceback …", restart=True),
        Failure("timeout", "no result", lost=True),
        BrokenContract("returned nothing"),
    ],
    ids=repr,
)
def test_a_message_comes_back_as_it_was(message):
    assert decode(encode(message, 3)) == (3, message)


def test_numbers_that_are_not_finite_travel_and_are_named():
    _, answer = decode(encode(Answer([1.0, None, math.inf, math.nan, -math.inf])))
    assert isinstance(answer, Answer)
    assert answer.not_finite.keys() == {2, 3, 4}
    assert math.isnan(answer.not_finite[3])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"\x80\x04\x8c\x05posix\x94.",  # a pickle
        b"7",
        b"{}",
        b'[0, "Answer"]',
        b'[0, "Answer", null]',
        b'[0, "Answer", {"rewards": [], "lost": true}]',
        b'[0, "Job", {}]',
        b'[0, ["Answer"], {}]',
        b'[0, "Ready", {"signatures": [{}]}]',
        b"[" * 100_000,
    ],
)
def test_other_bytes_are_refused(data):
    with pytest.raises(Garbled, match="the worker sent"):
        decode(data)
