"""One call of a reward function, in this process: what it may return and raise, and what is said of it."""

from __future__ import annotations

import json
import pickle
import re
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from grpo.scoring.call import Call, RewardFunction
from grpo.scoring.messages import Answer, BrokenContract, Failure, Outcome, Request, encode
from tests.scoring.helpers import MISBEHAVING, spec_of


def call(function: Any, *completions: str, **columns: Any) -> Outcome:
    """What comes of a call of a function, given itself or by its name in misbehaving.py."""
    name = function if isinstance(function, str) else "length"
    loaded = RewardFunction(spec_of(name))
    if not isinstance(function, str):
        loaded.fn = function
    texts = list(completions or "ab")
    request = Request(pickle.dumps(("p", columns)), texts, [[1]] * len(texts), ["stop"] * len(texts), "")
    return Call(loaded, request, SimpleNamespace(global_step=1, max_steps=2)).run()


@pytest.mark.parametrize(
    ("returned", "rewards"),
    [
        ([1, 0.5], [1.0, 0.5]),
        ((True, None), [1.0, None]),
        (np.array([1, 2], dtype=np.float16), [1.0, 2.0]),
        (np.array([[1], [0]]), [1.0, 0.0]),
        ([np.float32(0.5), np.bool_(True)], [0.5, 1.0]),
        (torch.tensor([0.25, 1.0], dtype=torch.bfloat16), [0.25, 1.0]),
        ([torch.tensor(2), torch.tensor([3.0])], [2.0, 3.0]),
        ((float(i) for i in range(2)), [0.0, 1.0]),
        ({1.0: "a", 2.0: "b"}.keys(), [1.0, 2.0]),
    ],
)
def test_what_counts_as_rewards(returned, rewards):
    outcome = call(lambda **_: returned)
    assert outcome == Answer(rewards)
    assert all(value is None or type(value) is float for value in outcome.rewards)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned NoneType None; expected a list with one entry for each of the 2 completions"),
        (1.0, "returned float 1.0; expected a list"),
        (np.float64(1), "returned float64 .*; expected a list"),
        (np.array(1.0), "returned ndarray .*; expected a list"),
        (torch.tensor(1.0), "returned Tensor .*; expected a list"),
        ("ab", "returned str 'ab'; expected a list"),
        (b"ab", "returned bytes b'ab'; expected a list"),
        ({"a": 1, "b": 2}, "returned dict .*; expected a list"),
        ([1.0], r"returned 1 values \(list \[1.0\]\); expected a list with one entry for each of the 2"),
        (["good", 1], "returned a list with str 'good'; expected numbers, or None"),
        ([Decimal(1), 1], r"returned a list with Decimal Decimal\('1'\); expected numbers"),
        ([Fraction(1), 1], r"returned a list with Fraction Fraction\(1, 1\); expected numbers"),
        ([1j, 1], "returned a list with complex 1j; expected numbers"),
        (np.ones((2, 2)), "returned a list with ndarray .*; expected numbers"),
        ([[1.0], [2.0]], r"returned a list with list \[1.0\]; expected numbers"),
    ],
)
def test_what_does_not_breaks_the_contract(returned, said):
    outcome = call(lambda **_: returned)
    assert isinstance(outcome, BrokenContract)
    assert re.match(said, outcome.message)


def test_an_async_generator_is_no_list_of_rewards():
    async def yields(**_):
        yield 1.0

    outcome = call(yields)
    assert isinstance(outcome, BrokenContract)
    assert "async_generator" in outcome.message


def test_a_log_of_the_wrong_length_breaks_the_contract():
    outcome = call("extra_short", "a", "b", "c")
    assert isinstance(outcome, BrokenContract)
    assert outcome.message.startswith("log_extra('x') got 1 values")
    assert "each of the 3 completions" in outcome.message


@pytest.mark.parametrize(
    ("function", "last_line"),
    [
        ("raises", "KeyError: 'no such key'"),
        ("system_exit", "SystemExit"),
        ("interrupts", "KeyboardInterrupt"),
        ("rude", "Rude: <exception str() failed>"),
        ("frozen", "Frozen: cold"),
        ("raises_late", "ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_it_raises_is_a_failure_told_from_its_own_line_on(function, last_line):
    outcome = call(function, "a", "bad")
    assert isinstance(outcome, Failure)
    assert (outcome.cause, outcome.lost, outcome.restart) == ("error", False, False)
    first, line, *_, last = outcome.message.strip().splitlines()
    assert first == "Traceback (most recent call last):"
    assert str(MISBEHAVING) in line  # our own frames are of no use to a user
    assert last.endswith(last_line)


def test_after_a_memory_error_the_process_is_replaced():
    def hungry(**_):
        raise MemoryError

    outcome = call(hungry)
    assert isinstance(outcome, Failure)
    assert outcome.restart


def test_a_traceback_without_end_is_cut():
    outcome = call(lambda **_: {}["x" * 100_000])
    assert isinstance(outcome, Failure)
    assert len(outcome.message) <= 4000


def test_what_is_logged_becomes_plain_values():
    def logs(completions, log_extra, log_metric, log_verdict, **_):
        log_extra("x", [np.float64(0.5), {1: (float("nan"), {2}, b"b", 10**30)}])
        log_metric("m", torch.tensor(1))
        log_metric("m", True)
        log_verdict([SimpleNamespace(outcome=SimpleNamespace(value="wrong"), detail=3), "fine"])
        return [0, 1]

    outcome = call(logs)
    assert outcome == Answer(
        [0.0, 1.0],
        ["wrong", "fine"],
        ["3", ""],
        {"m": [1.0, 1.0]},
        {"x": [0.5, {"1": ["nan", "{2}", "b'b'", 10**30]}]},
    )
    json.loads(encode(outcome))


def test_a_function_without_kwargs_gets_what_it_names():
    assert call("plain", "a", target=8, nums=[1]) == Answer([4.0])


def test_each_completion_has_its_own_copy_of_the_row():
    def pops(completions, nums, **_):
        return [copy.pop() for copy in nums]

    assert call(pops, nums=[1, 2]) == Answer([2.0, 2.0])
