"""Advantages against plain loops, and what None-aware groups must do."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.advantages import STD_OFFSET, group_advantages, zero_std

nan = float("nan")


def in_plain_loops(rewards: list[list[float]], scale: str, baseline: str) -> list[list[float]]:
    """The definition, completion by completion; NaN is unscored."""
    everything = [r for group in rewards for r in group if r == r]
    out = []
    for group in rewards:
        scored = [r for r in group if r == r]
        row = []
        for r in group:
            if r != r or len(set(scored)) < 2:
                row.append(0.0)
                continue
            others_mean = (sum(scored) - r) / (len(scored) - 1)
            a = r - (statistics.fmean(scored) if baseline == "group" else others_mean)
            if scale == "group":
                a /= statistics.stdev(scored) + STD_OFFSET
            elif scale == "batch":
                a /= statistics.stdev(everything) + STD_OFFSET
            row.append(a)
        out.append(row)
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@given(
    st.integers(2, 6).flatmap(
        lambda g: st.lists(
            st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, nan]), min_size=g, max_size=g), min_size=1, max_size=5
        )
    )
)
def test_agrees_with_plain_loops(scale: str, baseline: str, rewards: list[list[float]]) -> None:
    ours = group_advantages(np.array(rewards), scale_rewards=scale, baseline=baseline)
    np.testing.assert_allclose(ours, in_plain_loops(rewards, scale, baseline), atol=1e-12)


def test_equal_rewards_give_exactly_zero_whatever_the_rounding() -> None:
    """The mean of seven times 0.1 is not 0.1 in floating point; that deviation must not become signal."""
    advantages = group_advantages(np.full((1, 7), 0.1))
    assert (advantages == 0).all()
    assert zero_std(np.full((1, 7), 0.1)).all()


def test_an_unscored_completion_does_not_move_the_others() -> None:
    with_unscored = group_advantages(np.array([[1.0, 0.0, nan, 0.0]]))
    without = group_advantages(np.array([[1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(with_unscored[0, [0, 1, 3]], without[0])
    assert with_unscored[0, 2] == 0


def test_a_group_with_one_scored_completion_has_no_signal() -> None:
    assert zero_std(np.array([[1.0, nan, nan], [nan, nan, nan]])).all()


@pytest.mark.parametrize(("keyword", "value"), [("scale_rewards", "std"), ("baseline", "mean")])
def test_an_unknown_name_is_refused(keyword: str, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        group_advantages(np.zeros((1, 2)), **{keyword: value})
