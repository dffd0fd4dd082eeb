"""Evaluation's numbers against plain loops and simulation: pass@k and the intervals."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import NormalDist, stdev

import numpy as np
import pytest

from grpo.evaluation.statistics import Z_95, accuracy_metrics, clustered_interval, pass_at_k, wilson_interval

Z = NormalDist().inv_cdf(0.975)


def names(count: int) -> list[str]:
    return [f"question {i}" for i in range(count)]


def interval(solved_PG: np.ndarray, questions_P: list[str]) -> tuple[float, float]:
    metrics = accuracy_metrics(solved_PG, questions_P)
    return metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]


def by_plain_loops(solved_PG: np.ndarray, questions_P: list[str]) -> tuple[float, float]:
    """The formula of ``clustered_interval``, outcome by outcome."""
    outcomes = [(questions_P[p], float(y)) for p, row in enumerate(solved_PG) for y in row]
    mean = sum(y for _, y in outcomes) / len(outcomes)
    sums: dict[str, float] = {}
    for question, y in outcomes:
        sums[question] = sums.get(question, 0.0) + (y - mean)
    C = len(sums)
    error = math.sqrt(C / (C - 1) * sum(s**2 for s in sums.values())) / len(outcomes)
    return max(0.0, mean - Z * error), min(1.0, mean + Z * error)


# ---------------------------------------------------------------------------------------------------------------------
# pass@k


def test_pass_at_k_is_the_share_of_k_subsets_with_a_solution() -> None:
    for samples in range(1, 8):
        for solved in range(samples + 1):
            outcomes = [1] * solved + [0] * (samples - solved)
            for k in range(1, samples + 1):
                subsets = [max(subset) for subset in combinations(outcomes, k)]
                assert pass_at_k(solved, samples, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("G", "ks"), [(1, []), (2, [2]), (3, [2]), (4, [2, 4]), (7, [2, 4]), (8, [2, 4, 8])])
def test_accuracy_and_pass_at_k_are_means_over_prompts(G: int, ks: list[int]) -> None:
    solved_PG = np.random.default_rng(G).random((9, G)) < 0.3
    metrics = accuracy_metrics(solved_PG, names(9))
    assert metrics["eval/accuracy"] == pytest.approx(sum(map(sum, solved_PG.tolist())) / (9 * G))
    assert [name for name in metrics if "pass@" in name] == [f"eval/pass@{k}" for k in ks]
    for k in ks:
        prompts = [np.mean([any(subset) for subset in combinations(row, k)]) for row in solved_PG.tolist()]
        assert metrics[f"eval/pass@{k}"] == pytest.approx(sum(prompts) / 9)


# ---------------------------------------------------------------------------------------------------------------------
# Wilson's interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_has_the_numbers_of_newcombe_1998(successes: int, trials: int, low: float, high: float) -> None:
    """Statistics in Medicine 17, 857-872, table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_defining_equation() -> None:
    assert pytest.approx(Z, abs=1e-12) == Z_95
    for trials in (1, 2, 7, 100):
        for successes in {0, 1, trials // 3, trials - 1, trials}:
            share = successes / trials
            low, high = wilson_interval(successes, trials)
            assert 0.0 <= low <= share + 1e-12
            assert share - 1e-12 <= high <= 1.0
            assert high - low > 0.01
            for p in (low, high):
                assert (share - p) ** 2 == pytest.approx(Z**2 * p * (1 - p) / trials, abs=1e-12)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_one_completion_of_each_question_has_wilsons_interval() -> None:
    solved_P1 = np.array([[True], [False], [False], [True], [False]])
    assert interval(solved_P1, names(5)) == wilson_interval(2, 5)


# ---------------------------------------------------------------------------------------------------------------------
# The clustered interval


@pytest.mark.parametrize("G", [2, 5])
def test_without_repeats_it_is_that_of_the_mean_over_prompts(G: int) -> None:
    solved_PG = np.random.default_rng(G).random((40, G)) < 0.4
    means = [sum(row) / G for row in solved_PG.tolist()]
    mean, half = sum(means) / 40, Z * stdev(means) / math.sqrt(40)
    assert interval(solved_PG, names(40)) == pytest.approx((mean - half, mean + half), abs=1e-12)


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("questions", [3, 17])
def test_where_questions_repeat_it_is_the_formula_by_plain_loops(G: int, questions: int) -> None:
    draw = np.random.default_rng(questions)
    which_P = draw.integers(questions, size=60)
    chance_P = draw.random(questions)[which_P]
    solved_PG = draw.random((60, G)) < chance_P[:, None]
    questions_P = [f"question {i}" for i in which_P]
    assert interval(solved_PG, questions_P) == pytest.approx(by_plain_loops(solved_PG, questions_P), abs=1e-12)


@pytest.mark.parametrize("G", [2, 3])
def test_a_question_that_is_listed_twice_with_the_same_outcomes_says_nothing_more(G: int) -> None:
    solved_PG = np.random.default_rng(1).random((30, G)) < 0.5
    once = interval(solved_PG, names(30))
    assert interval(np.tile(solved_PG, (2, 1)), names(30) * 2) == pytest.approx(once, abs=1e-12)
    assert once[1] - once[0] > 1.3 * np.subtract(*interval(np.tile(solved_PG, (2, 1)), names(60))[::-1])


def test_it_holds_the_truth_in_95_of_100_where_questions_repeat() -> None:
    """60 questions of their own difficulty, twice each, two completions a row; the mean difficulty is 0.5."""
    draw = np.random.default_rng(0)
    inside, naive = [], []
    for _ in range(2000):
        chance_PG = np.repeat(draw.beta(0.5, 0.5, 60), 2)[:, None].repeat(2, axis=1)
        solved_PG = draw.random(chance_PG.shape) < chance_PG
        low, high = clustered_interval(solved_PG, [f"{p // 2}" for p in range(120)])
        inside.append(low <= 0.5 <= high)
        low, high = wilson_interval(solved_PG.sum(), solved_PG.size)
        naive.append(low <= 0.5 <= high)
    assert 0.93 < np.mean(inside) < 0.965
    assert np.mean(naive) < 0.85


def test_it_stays_in_0_to_1_and_one_question_alone_leaves_it_open() -> None:
    low, high = interval(np.array([[True, True], [True, False]]), names(2))
    assert 0.0 <= low < 0.75 < high <= 1.0
    assert interval(np.array([[True, False]]), ["a"]) == (0.0, 1.0)
    assert interval(np.array([[True], [False]]), ["a", "a"]) == (0.0, 1.0)
