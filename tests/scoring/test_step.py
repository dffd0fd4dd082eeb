"""A step's scoring with real workers: one bad completion costs one, and too many end the run by name."""

from __future__ import annotations

import logging
import time

import pytest

from grpo.config import RewardConfig
from grpo.errors import RunError, UserError
from grpo.scoring import step as step_module
from grpo.types import Status
from tests.scoring.helpers import SHORT, alive, group, misbehaving, scorer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "verdict"),
    [
        ("raises", "error"),
        ("system_exit", "error"),
        ("rude", "error"),
        ("raises_late", "error"),
        ("memory", "error"),
        ("async_exits", "error"),
        ("loops", "timeout"),
        ("power_tower", "timeout"),
        ("await_forever", "timeout"),
        ("async_loops", "timeout"),
        ("exits", "crashed"),
        ("segfault", "crashed"),
        ("killed", "crashed"),
        ("closes_files", "crashed"),
        ("killed_while_it_answers", "crashed"),
        ("nan", "not_finite"),
        ("infinite", "not_finite"),
    ],
)
def test_one_bad_completion_costs_one(monkeypatch, function, verdict):
    monkeypatch.setattr(step_module, "ASYNC_GRACE", 0.2)
    with scorer(misbehaving(function), timeout=SHORT if verdict == "timeout" else 20.0) as s:
        groups = [group("a", "bb", "bad", "cccc"), group("a", "bb", id=1)]
        s.score(groups, step=1)
        assert groups[0].rewards == [1.0, 2.0, None, 4.0]
        assert groups[0].rewards_by_function == {function: [1.0, 2.0, None, 4.0]}
        assert groups[0].verdicts[function] == {verdict: 1}
        assert groups[0].said == {function: ["scored", "scored", verdict, "scored"]}
        assert groups[1].rewards == [1.0, 2.0]
        s.score(groups[1:], step=2)  # and the worker is there again
        assert groups[1].rewards == [1.0, 2.0]
        assert all(map(alive, s.worker_pids))


def test_a_function_that_needs_its_group_loses_the_group():
    with scorer(misbehaving("whole", needs_group=True), timeout=SHORT) as s:
        groups = [group("a", "bad", "c"), group("a", "b", "c", id=1)]
        s.score(groups, step=1)
    assert groups[0].rewards == [None, None, None]
    assert groups[0].verdicts == {"whole": {"timeout": 3}}
    assert groups[1].rewards == [3.0, 3.0, 3.0]


def test_groups_that_come_later_are_scored_and_counted_with_the_first(caplog):
    with scorer(misbehaving("raises"), max_failure_rate=0.5) as s:
        groups = [group("a", "bad"), group("bad", "bb", id=1)]
        scoring = s.start(step=3)
        with caplog.at_level(logging.WARNING, "grpo.scoring"):
            for g in groups:
                scoring.add(g)
                scoring.finish()
        assert [g.rewards for g in groups] == [[1.0, None], [None, 2.0]]
        scoring.add(group("bad"))
        with pytest.raises(RunError, match="could not score 3 of 5 completions"):
            scoring.finish()
    first, second = (record.getMessage() for record in caplog.records)
    assert "step 3: reward 'raises'" in first
    assert "could not score 1 of 2 completions (error 1). The first: prompt 0, completion 1: Traceback" in first
    assert second.endswith("could not score 2 of 4 completions (error 2)")  # a traceback once a run, then a line


def test_async_calls_of_a_step_are_awaited_together():
    with scorer(misbehaving("awaits"), timeout=5) as s:
        groups = [group("a", "bb", id=i) for i in range(20)]
        started = time.monotonic()
        s.score(groups, step=1)
        assert time.monotonic() - started < 2  # one after the other: 6 s
    assert all(g.rewards == [1.0, 2.0] for g in groups)


# ------------------------------------------------------------------------------------------------ mistakes and failures


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("too_few", "returned 1 values .*one entry for each of the 3 completions"),
        ("extra_short", r"log_extra\('x'\) got 1 values .*each of the 3 completions"),
    ],
)
def test_a_broken_contract_ends_the_run_by_name(function, said):
    with (
        scorer(misbehaving(function)) as s,
        pytest.raises(RunError, match=rf"reward '{function}' \(.*misbehaving.py:{function}\) {said}"),
    ):
        s.score([group("a", "b", "c")], step=1)


def test_too_many_failures_end_the_run_with_the_first_traceback():
    with scorer(misbehaving("raises"), max_failure_rate=0.5) as s:
        g = group("a", "b", "bad", "bad")
        s.score([g], step=6)  # half is allowed
        assert g.rewards == [1.0, 1.0, None, None]
        with pytest.raises(RunError) as error:
            s.score([group("a", "bad", "bad", "bad", id=41)], step=7)
    message = str(error.value)
    for part in ("step 7", "'raises'", "misbehaving.py", "3 of 4", "error 3", "prompt 41, completion 1", "KeyError"):
        assert part in message
    assert 'return _each(completions, lambda c: {}["no such key"])' in message
    assert "grpo/scoring/" not in message  # our own frames are of no use to a user


def test_too_much_that_is_not_finite_ends_the_run_by_name():
    said = r"reward .nan. \(.*misbehaving.py:nan\).*not_finite 1.*prompt 7, completion 1: it returned nan; expected a f"
    with scorer(misbehaving("nan"), max_failure_rate=0.0) as s, pytest.raises(RunError, match=said):
        s.score([group("a", "bad", id=7)], step=1)


@pytest.mark.parametrize("function", ["loops", "power_tower", "await_forever"])
def test_where_it_hung_is_told(function):
    with (
        scorer(misbehaving(function), timeout=SHORT, max_failure_rate=0.0) as s,
        pytest.raises(RunError, match=rf"no result after {SHORT:g} s(.|\n)*misbehaving.py\", line \d+"),
    ):
        s.score([group("bad")], step=1)


def test_broken_gold_counts_as_failure_and_none_of_ones_own_does_not():
    with scorer(misbehaving("ints_and_none"), max_failure_rate=0.0) as s:
        g = group("a", "bad")
        s.score([g], step=1)
        assert g.rewards == [1.0, None]
        assert g.verdicts == {"ints_and_none": {"unscored": 1}}
    with scorer(RewardConfig(name="countdown"), max_failure_rate=0.5) as s:
        g = group("<answer>1</answer>", columns={"nums": ["1"], "target": 1})
        with pytest.raises(RunError, match=r"\(gold_unparseable 1\), more than(.|\n)*nums and target must be integers"):
            s.score([g], step=1)


def test_columns_are_checked():
    with scorer(RewardConfig(name="countdown")) as s:
        with pytest.raises(UserError, match=r"needs target: neither a column of the rows \(answer, nums\) nor"):
            s.score([group("a", columns={"nums": [1], "answer": 1})], step=1)
        with pytest.raises(UserError, match="the rows have a column 'status'"):
            s.score([group("a", columns={"nums": [1], "target": 1, "status": "new"})], step=1)


# -------------------------------------------------------------------------------------------- what comes into the group


def test_weighted_sum_leaves_out_what_could_not_be_scored():
    with scorer(
        misbehaving("raises", weight=10),
        RewardConfig(name="format", weight=0.5),
        misbehaving("ints_and_none", weight=3),
        RewardConfig(name="format", weight=0.0),
    ) as s:
        assert s.names == ["raises", "format", "ints_and_none", "format#2"]
        g = group("<think>a</think><answer>b</answer>", "bad", "")
        g.completions[2].status = Status.ERROR
        s.score([g], step=1)
        assert g.rewards == [10 * 34 + 0.5 + 3, 0.0, None]
        assert g.verdicts["raises"] == {"error": 1, "not_generated": 1}
        assert g.verdicts["format"] == {"correct": 1, "wrong": 1, "not_generated": 1}
        assert g.said["raises"] == ["scored", "error", "not_generated"]
        assert g.said["format"] == ["correct", "wrong", "not_generated"]
        assert g.said["ints_and_none"] == ["scored", "unscored", "not_generated"]
    only = group("bad")
    with scorer(misbehaving("raises")) as s:
        s.score([only], step=1)
    assert only.rewards == [None]
