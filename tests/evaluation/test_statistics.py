"""Evaluation's numbers against plain loops and simulation: pass@k and the intervals."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, product
from statistics import NormalDist, stdev

import numpy as np
import pytest

from grpo.evaluation.statistics import (
    Z_95,
    accuracy_metrics,
    clustered,
    clustered_interval,
    maj_at_k,
    paired_test,
    pass_at_k,
    sign_flip_p,
    t_95,
    wilson_interval,
)

Z = NormalDist().inv_cdf(0.975)


def names(count: int) -> list[str]:
    return [f"question {i}" for i in range(count)]


def interval(solved_PG: np.ndarray, questions_P: list[str]) -> tuple[float, float]:
    metrics = accuracy_metrics(solved_PG, questions_P)
    return metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]


def by_plain_loops(solved_PG: np.ndarray, questions_P: list[str]) -> tuple[float, float]:
    """The formulas of ``clustered`` and ``clustered_interval``, outcome by outcome."""
    outcomes = [(questions_P[p], float(y)) for p, row in enumerate(solved_PG) for y in row]
    mean = sum(y for _, y in outcomes) / len(outcomes)
    sums: dict[str, float] = {}
    for question, y in outcomes:
        sums[question] = sums.get(question, 0.0) + (y - mean)
    C = len(sums)
    error = math.sqrt(C / (C - 1) * sum(s**2 for s in sums.values())) / len(outcomes)
    trials = mean * (1 - mean) / error**2 * (Z / t_95(C - 1)) ** 2
    return wilson_interval(mean * trials, trials)


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
def test_without_repeats_the_error_is_that_of_the_mean_over_prompts(G: int) -> None:
    solved_PG = np.random.default_rng(G).random((40, G)) < 0.4
    means = [sum(row) / G for row in solved_PG.tolist()]
    found = clustered(solved_PG.mean(1), names(40))
    assert found == pytest.approx((sum(means) / 40, stdev(means) / math.sqrt(40), 40), abs=1e-12)
    low, high = interval(solved_PG, names(40))
    assert low < found.mean < high
    assert high - low == pytest.approx(2 * t_95(39) * found.error, rel=0.05)


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


@pytest.mark.parametrize(
    ("C", "G", "easy", "hard"), [(60, 2, 0.5, 0.5), (30, 16, 0.5, 0.5), (30, 4, 0.2, 1.8), (198, 8, 0.9, 2)]
)
def test_it_holds_the_truth_in_95_of_100(C: int, G: int, easy: float, hard: float) -> None:
    """C questions of their own difficulty, in two rows of G completions each; the mean difficulty is known. The normal
    interval of the clustered error, and Wilson's of all outcomes, hold it less often."""
    draw = np.random.default_rng(0)
    truth = easy / (easy + hard)
    questions = [f"{p // 2}" for p in range(2 * C)]
    inside, naive = [], []
    for _ in range(600):
        chance_PG = np.repeat(draw.beta(easy, hard, C), 2)[:, None].repeat(G, axis=1)
        solved_PG = draw.random(chance_PG.shape) < chance_PG
        low, high = clustered_interval(solved_PG, questions)
        inside.append(low <= truth <= high)
        low, high = wilson_interval(solved_PG.sum(), solved_PG.size)
        naive.append(low <= truth <= high)
    assert 0.92 < np.mean(inside) < 0.985
    assert np.mean(naive) < 0.88


def test_where_nothing_is_solved_it_is_as_wide_as_for_so_many_questions() -> None:
    low, high = interval(np.zeros((30, 16), bool), names(30))
    assert (low, high) == wilson_interval(0, 30)
    assert 0.1 < high < 0.12
    assert interval(np.ones((30, 16), bool), names(30)) == pytest.approx((1 - high, 1.0))


def test_it_stays_in_0_to_1_and_one_question_alone_leaves_it_open() -> None:
    low, high = interval(np.array([[True, True], [True, False]]), names(2))
    assert 0.0 <= low < 0.75 < high <= 1.0
    assert interval(np.array([[True, False]]), ["a"]) == (0.0, 1.0)
    assert interval(np.array([[True], [False]]), ["a", "a"]) == (0.0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# maj@k


def votes_for(answers: tuple[str, ...]) -> float:
    """The chance that a vote is right: "r" is right, "-" no answer; ties are drawn."""
    counts = Counter(answer for answer in answers if answer != "-")
    first = [answer for answer, count in counts.items() if count == max(counts.values())]
    return ("r" in first) / len(first) if first else 0.0


@pytest.mark.parametrize("samples", [1, 3, 5, 6])
def test_maj_at_k_is_the_mean_over_all_subsets_with_ties_drawn(samples: int) -> None:
    for answers in product("rab-", repeat=samples):
        if sorted(answers) != list(answers):
            continue
        wrong = tuple(count for answer, count in Counter(answers).items() if answer in "ab")
        for k in range(1, samples + 1):
            subsets = [votes_for(subset) for subset in combinations(answers, k)]
            found = maj_at_k(answers.count("r"), wrong, samples, k)
            assert found == pytest.approx(sum(subsets) / len(subsets), abs=1e-12), (answers, k)


def test_maj_at_k_by_drawing_subsets_of_many_samples() -> None:
    draw = np.random.default_rng(5)
    answers = ["r"] * 9 + ["a"] * 8 + ["b"] * 5 + [f"w{i}" for i in range(6)] + ["-"] * 4
    drawn = [votes_for(tuple(draw.choice(answers, 8, replace=False))) for _ in range(2500)]
    found = maj_at_k(9, (8, 5, *[1] * 6), 32, 8)
    assert abs(np.mean(drawn) - found) < 4 * np.std(drawn) / math.sqrt(len(drawn))
    assert maj_at_k(9, (8, 5, *[1] * 6), 32, 1) == pytest.approx(9 / 32), "a vote of one is the mean"


# ---------------------------------------------------------------------------------------------------------------------
# The paired test


def test_a_sign_flip_p_is_the_share_of_all_ways_to_set_the_signs() -> None:
    draw = np.random.default_rng(2)
    for size in (1, 2, 5, 9):
        differences = draw.integers(-8, 9, size) / 8
        sums = [
            abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((-1, 1), repeat=size)
        ]
        expected = np.mean([total >= abs(sum(differences)) - 1e-9 for total in sums])
        assert sign_flip_p(differences) == pytest.approx(expected, abs=1e-12)
    assert sign_flip_p(np.zeros(7)) == 1.0


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024), (3, 3, 1.0), (600, 400, 2.7e-10)],
)
def test_with_one_completion_a_question_it_is_mcnemars_exact_test(better: int, worse: int, p: float) -> None:
    one = [0.0] * better + [1.0] * worse + [1.0, 0.0]
    other = [1.0] * better + [0.0] * worse + [1.0, 0.0]
    found = paired_test(one, other, names(len(one)))
    assert found.p == pytest.approx(p, rel=0.05)
    assert paired_test(other, one, names(len(one))).p == found.p
    assert (found.better, found.worse) == (better, worse)
    assert found.difference == pytest.approx((better - worse) / len(one))


def test_rows_of_one_question_flip_together() -> None:
    one, other = [0.0] * 12, [1.0] * 12
    assert paired_test(one, other, names(12)).p == pytest.approx(2 / 2**12)
    assert paired_test(one, other, [f"{i // 3}" for i in range(12)]).p == pytest.approx(2 / 2**4)
    alone = paired_test(one, other, ["a"] * 12)
    assert (alone.p, alone.low, alone.high) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(("C", "one", "other"), [(30, 8, 8), (30, 16, 4), (120, 1, 1)])
def test_under_the_null_it_errs_in_5_of_100_and_its_interval_holds_0(C: int, one: int, other: int) -> None:
    """Two models with the same chance on every question, which differs from question to question, in two rows each."""
    draw = np.random.default_rng(C + one)
    questions = [f"{p // 2}" for p in range(2 * C)]
    errs, holds = [], []
    for _ in range(400):
        chance_P = np.repeat(draw.beta(0.7, 0.7, C), 2)
        found = paired_test(draw.binomial(one, chance_P) / one, draw.binomial(other, chance_P) / other, questions)
        errs.append(found.p <= 0.05)
        holds.append(found.low <= 0 <= found.high)
    assert np.mean(errs) < 0.08
    assert np.mean(holds) > 0.92


def test_pairing_sees_a_gain_that_the_two_intervals_do_not() -> None:
    draw = np.random.default_rng(3)
    chance_P = draw.beta(0.5, 0.5, 200)
    one = draw.binomial(8, chance_P) / 8
    other = draw.binomial(8, np.minimum(1, chance_P + 0.05 * (chance_P < 0.95))) / 8
    found = paired_test(one.tolist(), other.tolist(), names(200))
    assert found.p < 0.01
    assert 0 < found.low < 0.05 < found.high
    (_, before), (after, _) = (clustered_interval(x[:, None], names(200)) for x in (one, other))
    assert before > after


def test_shares_that_lie_on_no_common_grid_are_rounded_to_one() -> None:
    draw = np.random.default_rng(4)
    differences = draw.normal(0.02, 0.2, 300)
    coarse = sign_flip_p(np.round(differences * 64) / 64)
    assert sign_flip_p(differences) == pytest.approx(coarse, abs=0.02)
