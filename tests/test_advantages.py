"""Advantages against plain loops, and what None-aware groups must do."""

from __future__ import annotations

import ast
import itertools
import math
import statistics
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.advantages import (
    STD_OFFSET,
    group_advantages,
    normalize_then_sum,
    pass_at_k_advantages,
    rewards_array,
    step_advantages,
    zero_std,
)
from grpo.config import AlgorithmConfig
from grpo.types import Group, Prompt

nan = float("nan")


def in_plain_loops(rewards: list[list[float]], scale: str, baseline: str) -> list[list[float]]:
    """The definition, completion by completion; NaN is unscored."""
    everything = [r for group in rewards for r in group if r == r]
    out = []
    for group in rewards:
        scored = [r for r in group if r == r]
        row = []
        for r in group:
            compared = {"batch": everything, "none": [0, 1]}.get(baseline, scored)
            if r != r or len(set(compared)) < 2:
                row.append(0.0)
                continue
            if baseline == "leave_one_out":
                a = r - (sum(scored) - r) / (len(scored) - 1)
            else:
                a = r - {"group": statistics.fmean(scored), "batch": statistics.fmean(everything)}.get(baseline, 0.0)
            if scale == "group":
                a /= statistics.stdev(scored) + STD_OFFSET
            elif scale == "batch":
                a /= (statistics.stdev(everything) if len(everything) > 1 else 0.0) + STD_OFFSET
            row.append(a)
        out.append(row)
    return out


@pytest.mark.parametrize(
    ("scale", "baseline"),
    [(s, b) for s in ("group", "batch", "none") for b in ("group", "leave_one_out")]
    + [("batch", "batch"), ("none", "batch"), ("none", "none")],
)
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


@pytest.mark.parametrize(("scale", "baseline"), [("group", "batch"), ("group", "none"), ("batch", "none")])
def test_what_would_divide_equal_rewards_by_nothing_is_refused(scale: str, baseline: str) -> None:
    with pytest.raises(ValueError, match="does not go with"):
        group_advantages(np.array([[1.0, 1.0], [0.0, 0.0]]), scale_rewards=scale, baseline=baseline)


# --- several rewards, each normalized by itself (GDPO) ---


def trl_advantages(rewards_PGF: np.ndarray, weights_F: list[float], **settings: str) -> np.ndarray:
    """What the lines of TRL's trainer make of them, in float64: cut out of its method, which does all else as well."""
    import torch

    spec = util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("trl is not installed")
    assert metadata.version("trl").startswith("1."), "the lines were found in TRL 1.16"
    room = Path(spec.submodule_search_locations[0]) / "trainer"
    utils = ast.parse((room / "utils.py").read_text())
    nanstd = next(n for n in ast.walk(utils) if isinstance(n, ast.FunctionDef) and n.name == "nanstd")
    trainer = ast.parse((room / "grpo_trainer.py").read_text())
    method = next(
        n for n in ast.walk(trainer) if isinstance(n, ast.FunctionDef) and n.name == "_generate_and_score_completions"
    )
    starts = [i for i, n in enumerate(method.body) if ast.unparse(n).startswith("unscorable_mask =")]
    ends = [i for i, n in enumerate(method.body) if ast.unparse(n).startswith("advantages = torch.nan_to_num")]
    P, G, F = rewards_PGF.shape
    names: dict[str, Any] = {
        "torch": torch,
        "device": "cpu",
        "num_generations": G,
        "rewards_per_func": torch.tensor(rewards_PGF.reshape(P * G, F)),
        "self": SimpleNamespace(
            reward_funcs=[None] * F, reward_weights=torch.tensor(weights_F, dtype=torch.float64), **settings
        ),
    }
    lines = ast.Module([nanstd, *method.body[starts[0] : ends[0] + 1]], type_ignores=[])
    torch.set_default_dtype(torch.float64)  # or counts are divided in float32
    try:
        exec(compile(lines, "trl", "exec"), names)
    finally:
        torch.set_default_dtype(torch.float32)
    return names["advantages"].reshape(P, G).numpy()


def scored_by_several(seed: int) -> tuple[np.ndarray, list[float]]:
    """Rewards (6,5,3) of very different sizes with holes in them, a row nobody scored, and a group without a signal."""
    draw = np.random.default_rng(seed)
    rewards_PGF = draw.choice([0.0, 0.25, 1.0], size=(6, 5, 3)) * np.array([1.0, 30.0, 0.1])
    rewards_PGF[draw.random((6, 5, 3)) < 0.15] = nan
    rewards_PGF[0, 0] = nan
    rewards_PGF[5] = [1.0, 7.5, 0.1]
    return rewards_PGF, [1.0, 0.5, 2.0]


@pytest.mark.parametrize("seed", range(5))
def test_normalizing_before_the_sum_agrees_with_trl(seed: int) -> None:
    rewards_PGF, weights_F = scored_by_several(seed)
    theirs = trl_advantages(
        rewards_PGF, weights_F, multi_objective_aggregation="normalize_then_sum", scale_rewards="group"
    )
    ours = normalize_then_sum(rewards_PGF, weights_F)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert (ours[5] == 0).all()
    assert ours[0, 0] == 0
    assert np.abs(ours).max() > 1


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_summing_first_agrees_with_trl(scale: str) -> None:
    rewards_PGF, weights_F = scored_by_several(0)
    theirs = trl_advantages(
        rewards_PGF, weights_F, multi_objective_aggregation="sum_then_normalize", scale_rewards=scale
    )
    sums_PG = np.where(np.isnan(rewards_PGF).all(2), nan, np.nansum(rewards_PGF * np.array(weights_F), axis=2))
    np.testing.assert_allclose(group_advantages(sums_PG, scale_rewards=scale), theirs, atol=1e-12)


def test_normalizing_before_the_sum_in_plain_loops() -> None:
    rewards_PGF, weights_F = scored_by_several(1)
    sums: dict[tuple[int, int], float] = {}
    for p, group in enumerate(rewards_PGF.tolist()):
        for g, row in enumerate(group):
            for f, weight in enumerate(weights_F):
                scored = [r[f] for r in group if r[f] == r[f]]
                if row[f] == row[f]:
                    std = statistics.stdev(scored) if len(scored) > 1 else 0.0
                    part = weight * (row[f] - statistics.fmean(scored)) / (std + STD_OFFSET)
                    sums[p, g] = sums.get((p, g), 0.0) + part
    mean, std = statistics.fmean(sums.values()), statistics.stdev(sums.values())
    ours = normalize_then_sum(rewards_PGF, weights_F)
    for p, g in np.ndindex(*ours.shape):
        expected = (sums[p, g] - mean) / (std + STD_OFFSET) if (p, g) in sums else 0.0
        assert ours[p, g] == pytest.approx(expected, abs=1e-12)


def test_no_reward_drowns_another() -> None:
    """A large reward and a small one that disagree: the sum follows the large one, GDPO takes both as they are."""
    rewards_PGF = np.array([[[100.0, 0.0], [0.0, 0.1]], [[0.0, 0.0], [100.0, 0.1]]])
    summed = group_advantages(rewards_PGF.sum(axis=2))
    assert np.allclose(np.abs(summed), summed.max(), rtol=1e-3)
    apart = normalize_then_sum(rewards_PGF, [1.0, 1.0])
    assert np.allclose(apart[0], 0, atol=1e-2)
    assert apart[1, 1] > 1


# --- the best of k (Pass@k Training) ---


def best_of_every_subset(rewards: list[float], k: int) -> tuple[list[float], float]:
    """For each reward the mean best of the subsets with it, less that of all; and the deviation: by enumeration."""
    subsets = list(itertools.combinations(range(len(rewards)), k))
    best = [max(rewards[i] for i in subset) for subset in subsets]
    mean = statistics.fmean(best)
    means = [statistics.fmean(b for b, s in zip(best, subsets, strict=True) if i in s) for i in range(len(rewards))]
    return [m - mean for m in means], statistics.pstdev(best)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=5, max_size=7))
def test_pass_at_k_agrees_with_all_subsets(k: int, rewards: list[float]) -> None:
    centered, std = best_of_every_subset(rewards, k)
    with_unscored = np.array([[*rewards[:2], nan, *rewards[2:]]])
    ours = pass_at_k_advantages(with_unscored, k, scale_rewards="none")[0]
    assert ours[2] == 0
    np.testing.assert_allclose(np.delete(ours, 2), centered, atol=1e-12)
    scaled = pass_at_k_advantages(with_unscored, k)[0]
    np.testing.assert_allclose(np.delete(scaled, 2), np.array(centered) / (std + STD_OFFSET), atol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(8, 4), (16, 4), (6, 2)])
def test_pass_at_k_of_right_and_wrong_is_the_papers_formula(n: int, k: int) -> None:
    """Equations 14 and 15, times the deviation: of n rollouts `wrong` are wrong."""
    for wrong in range(n + 1):
        ours = pass_at_k_advantages(np.array([[0.0] * wrong + [1.0] * (n - wrong)]), k, scale_rewards="none")[0]
        mean = 1 - math.comb(wrong, k) / math.comb(n, k)
        assert ours[wrong:] == pytest.approx(1 - mean, abs=1e-12)
        if wrong:
            assert ours[:wrong] == pytest.approx(1 - mean - math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1))
        assert (ours == 0).all() == (wrong < k or wrong == n), "exactly 0 where every subset passes, or none"


def test_the_best_of_one_is_the_plain_advantage() -> None:
    rewards_PG = np.array([[1.0, 0.0, nan, 0.5], [0.0, 0.0, 0.0, 1.0]])
    for baseline in ("group", "leave_one_out"):
        plain = group_advantages(rewards_PG, scale_rewards="none", baseline=baseline)
        ours = pass_at_k_advantages(rewards_PG, 1, scale_rewards="none", baseline=baseline)
        np.testing.assert_allclose(ours, plain, atol=1e-12)


@pytest.mark.parametrize(("n", "k"), [(3, 2), (4, 2), (5, 3)])
@pytest.mark.parametrize("rewards_of_arms", [(1.0, 0.0, 0.0), (1.0, 0.3, 0.0)], ids=["right or wrong", "graded"])
def test_the_expected_gradient_is_that_of_the_best_of_k(n: int, k: int, rewards_of_arms: tuple[float, ...]) -> None:
    """A softmax over three arms, enumerated: E[mean_i(A_i grad log pi_i)] = grad E[best of k] / k, leave-one-out."""
    logits = np.array([-0.4, 0.3, 0.8])

    def probabilities(logits: np.ndarray) -> np.ndarray:
        return np.exp(logits) / np.exp(logits).sum()

    def best_of_k(logits: np.ndarray) -> float:
        p = probabilities(logits)
        draws = itertools.product(range(3), repeat=k)
        return sum(math.prod(p[a] for a in arms) * max(rewards_of_arms[a] for a in arms) for arms in draws)

    step = 1e-5
    true = np.array([(best_of_k(logits + e) - best_of_k(logits - e)) / (2 * step) for e in step * np.eye(3)])

    p = probabilities(logits)
    for baseline, factor in (("leave_one_out", 1.0), ("group", 1 - k / n)):
        expected = np.zeros(3)
        for arms in itertools.product(range(3), repeat=n):
            rewards = np.array([[rewards_of_arms[a] for a in arms]])
            advantages = pass_at_k_advantages(rewards, k, scale_rewards="none", baseline=baseline)[0]
            gradient = sum(a * (np.eye(3)[arm] - p) for a, arm in zip(advantages, arms, strict=True)) / n
            expected += math.prod(p[a] for a in arms) * gradient
        np.testing.assert_allclose(expected, factor * true / k, atol=1e-9)


def test_no_more_than_k_scored_say_nothing() -> None:
    assert (pass_at_k_advantages(np.array([[1.0, 0.0, nan, nan]]), 2) == 0).all()


# --- what a recipe asks for ---


def test_a_recipes_keys_choose_the_formula() -> None:
    def group(first: list[float | None], second: list[float | None], rewards: list[float | None]) -> Group:
        return Group(Prompt(0, "", "", []), [], rewards, {"a": first, "b": second})

    groups = [
        group([1.0, 0.0, None], [0.2, 0.1, None], [1.1, 0.05, None]),
        group([0.0, 0.0, 1.0], [0.1, 0.2, 0.1], [0.05, 0.1, 1.05]),
    ]
    rewards_PG = np.array([[1.1, 0.05, nan], [0.05, 0.1, 1.05]])
    rewards_PGF = np.array([[[1.0, 0.2], [0.0, 0.1], [nan, nan]], [[0.0, 0.1], [0.0, 0.2], [1.0, 0.1]]])
    weights = [1.0, 0.5]

    def found(**keys: Any) -> np.ndarray:
        return step_advantages(rewards_array(groups), groups, weights, AlgorithmConfig(**keys))

    np.testing.assert_array_equal(found(), group_advantages(rewards_PG))
    np.testing.assert_array_equal(
        found(scale_rewards="batch", baseline="batch"),
        group_advantages(rewards_PG, scale_rewards="batch", baseline="batch"),
    )
    np.testing.assert_array_equal(
        found(multi_objective_aggregation="normalize_then_sum"), normalize_then_sum(rewards_PGF, weights)
    )
    np.testing.assert_array_equal(
        found(pass_at_k=2, baseline="leave_one_out"), pass_at_k_advantages(rewards_PG, 2, baseline="leave_one_out")
    )
