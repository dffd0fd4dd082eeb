"""What outcomes say of a model, and how surely: intervals, pass@k, maj@k, and a paired test of two models.

Completions of one question are correlated, so the question is what counts as independent: intervals are clustered by
question, and the test of two models flips whole questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054
# Two-sided 95% quantiles of Student's t with 1, 2, ... degrees of freedom.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
FINEST = 100_000  # steps of the grid on which a sign-flip test adds up differences, over all questions


def t_95(degrees: int) -> float:
    """The two-sided 95% quantile of Student's t; within 0.01 of it."""
    return _T_95[degrees - 1] if degrees <= len(_T_95) else Z_95 + 2.6 / degrees


# --- intervals -------------------------------------------------------------------------------------------------------


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95% interval of a proportion of independent trials (Wilson 1927).

    Its ends are the two p with |successes / trials - p| = z sqrt(p (1 - p) / trials). Near 0 and 1 it stays inside
    [0, 1] and keeps a width, which the normal interval does not.
    """
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(max(0.0, share * (1 - share)) / trials + z2 / (4 * trials**2))
    low = max(0.0, center - half) if successes > 0 else 0.0  # exactly, where rounding would leave 1e-18
    return low, min(1.0, center + half) if successes < trials else 1.0


class Clustered(NamedTuple):
    """A mean over rows, its standard error, and how many clusters of rows with the same question there are."""

    mean: float
    error: float
    clusters: int


def clustered(values_P: np.ndarray, questions_P: Sequence[str]) -> Clustered:
    """The mean of rows' values, and its standard error where rows of one question are correlated:

        SE^2 = C / (C - 1) / P^2 * sum over C clusters of (sum over the cluster's rows of (value - mean))^2

    This is the cluster-robust variance of a mean (Liang & Zeger 1986; for evaluations of language models
    arXiv:2411.00640, eq. 4) with the usual factor for few clusters. Where no question repeats it is the variance of the
    values over P. One cluster alone says nothing about the spread: the error is then infinite.
    """
    mean = float(values_P.mean())
    sums_C = _sums(values_P - mean, questions_P)
    C = len(sums_C)
    return Clustered(mean, math.sqrt(C / (C - 1) * float((sums_C**2).sum())) / len(values_P) if C > 1 else math.inf, C)


def clustered_interval(values_PG: np.ndarray, questions_P: Sequence[str]) -> tuple[float, float]:
    """95% interval of the mean of values in [0, 1] (solved or not; pass@k of a row), clustered by question.

    It is Wilson's for as many independent trials as would give the clustered standard error, mean (1 - mean) / SE^2,
    times (z / t)^2 with t of C - 1 degrees of freedom, since SE is estimated from C questions (Korn & Graubard 1998;
    Franco et al. 2019 find it among the best for proportions of clustered samples). Unlike mean +- z SE it keeps a
    width where every question has the same outcome, the usual case of a small model on a hard suite: as many trials as
    there are questions are assumed there. One question alone leaves everything open.
    """
    mean, error, C = clustered(values_PG.mean(1), questions_P)
    if C == 1:
        return 0.0, 1.0
    trials = mean * (1 - mean) / error**2 * (Z_95 / t_95(C - 1)) ** 2 if error > 1e-12 else float(C)
    return wilson_interval(mean * trials, trials)


# --- several samples of a question -----------------------------------------------------------------------------------


def pass_at_k(solved: int, samples: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples solves it: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374)."""
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


@lru_cache(maxsize=4096)
def maj_at_k(right: int, wrong: tuple[int, ...], samples: int, k: int) -> float:
    """The chance that a majority vote among k of the samples is right (self-consistency, arXiv:2203.11171).

    ``right`` samples gave the right answer and ``wrong`` counts those of each wrong answer; what is left of ``samples``
    gave none and does not vote. It is the exact mean over all C(samples, k) subsets, so it is unbiased as ``pass_at_k``
    is. Among answers that are level one is drawn: with m of them a right one counts 1 / m. No votes at all count 0.
    """
    silent = samples - right - sum(wrong)
    wins = Fraction(0)
    for votes in range(1, min(right, k) + 1):
        # ways[level][others]: choices of so many other samples, of which so many wrong answers are level with `votes`
        most = (k - votes) // votes
        ways = [[math.comb(silent, x) for x in range(k - votes + 1)], *([0] * (k - votes + 1) for _ in range(most))]
        for size in wrong:
            ways = _with_answer(ways, size, votes)
        wins += math.comb(right, votes) * sum(Fraction(row[k - votes], level + 1) for level, row in enumerate(ways))
    return float(wins / math.comb(samples, k))


def _with_answer(ways: list[list[int]], size: int, votes: int) -> list[list[int]]:
    """The ways, with up to ``votes`` samples of one more wrong answer, which ``size`` samples gave."""
    taken = [math.comb(size, i) for i in range(min(size, votes) + 1)]
    more = [[0] * len(row) for row in ways]
    for level, row in enumerate(ways):
        for others, count in enumerate(row):
            if not count:
                continue
            for i, choices in enumerate(taken):
                to = level + (i == votes)
                if others + i < len(row) and to < len(more):
                    more[to][others + i] += count * choices
    return more


def ks(samples: int) -> list[int]:
    """The k for which pass@k and maj@k are told: 2, 4, 8, ... up to the number of samples."""
    return [2**i for i in range(1, samples.bit_length()) if 2**i <= samples]


def accuracy_metrics(solved_PG: np.ndarray, questions_P: Sequence[str]) -> dict[str, float]:
    """Accuracy, its 95% interval, and pass@k for k = 2, 4, 8, ... up to G.

    ``solved_PG`` is boolean; ``questions_P`` are the rows' questions. With one completion of each question the outcomes
    are independent and the interval is Wilson's. Otherwise it is ``clustered_interval``.
    """
    P, G = solved_PG.shape
    independent = G == 1 and len(set(questions_P)) == P
    low, high = wilson_interval(solved_PG.sum(), P) if independent else clustered_interval(solved_PG, questions_P)
    metrics = {"eval/accuracy": float(solved_PG.mean()), "eval/accuracy_low": low, "eval/accuracy_high": high}
    for k in ks(G):
        metrics[f"eval/pass@{k}"] = float(np.mean([pass_at_k(int(row.sum()), G, k) for row in solved_PG]))
    return metrics


# --- two models on the same questions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """The mean of the other model less the one's, its 95% interval and p. ``better`` and ``worse`` count the questions
    on which the other does better, and worse."""

    questions: int
    difference: float
    low: float
    high: float
    p: float
    better: int
    worse: int


def paired_test(one_P: Sequence[float], other_P: Sequence[float], questions_P: Sequence[str]) -> Paired:
    """Whether two models differ on the same rows, of which each solved a share (over its samples, as many as it has).

    The interval is the mean difference +- t SE, SE clustered by question. ``p`` is the exact sign-flip test: were there
    no difference, a question's would have either sign with the same chance; p is the share of all 2^C ways to set the
    signs that give a sum as far from 0 as the one found. With one completion a question that is McNemar's exact test.
    """
    differences_P = np.asarray(other_P, dtype=float) - np.asarray(one_P, dtype=float)
    mean, error, C = clustered(differences_P, questions_P)
    half = t_95(C - 1) * error if C > 1 else 1.0
    sums_C = _sums(differences_P, questions_P)
    return Paired(
        questions=C,
        difference=mean,
        low=max(-1.0, mean - half),
        high=min(1.0, mean + half),
        p=sign_flip_p(sums_C),
        better=int((sums_C > 1e-9).sum()),
        worse=int((sums_C < -1e-9).sum()),
    )


def sign_flip_p(differences_C: np.ndarray) -> float:
    """Two-sided exact p of the sign-flip (Fisher's randomization) test of the sum of differences.

    The distribution of the sum is built up difference by difference on a grid, on which shares of few samples lie
    exactly; others are rounded to it.
    """
    scale = _grid(differences_C)
    steps = [abs(step) for step in np.rint(differences_C * scale).astype(int).tolist() if step]
    found = abs(int(np.rint(differences_C * scale).sum()))
    chance = np.zeros(2 * sum(steps) + 1)  # of a sum x at chance[x + sum(steps)]
    middle = reach = sum(steps)
    chance[middle] = 1.0
    reach = 0
    for step in sorted(steps):
        inside = chance[middle - reach : middle + reach + 1] / 2
        reach += step
        chance[middle - reach : middle + reach + 1] = 0.0
        chance[middle - reach : middle - reach + len(inside)] += inside
        chance[middle + reach - len(inside) + 1 : middle + reach + 1] += inside
    if not found:
        return 1.0
    return float(min(1.0, 2 * chance[middle + found :].sum()))


def _grid(differences_C: np.ndarray) -> int:
    """Steps to 1 of the coarsest grid on which all differences lie, but no more than FINEST over all of them."""
    most = max(1, FINEST // len(differences_C))
    denominators = {Fraction(value).limit_denominator(1000).denominator for value in differences_C.tolist()}
    return min(math.lcm(*denominators), most)


def _sums(values_P: np.ndarray, questions_P: Sequence[str]) -> np.ndarray:
    """The sums of rows' values by question."""
    _, cluster_P = np.unique(np.asarray(questions_P), return_inverse=True)
    return np.bincount(cluster_P, weights=values_P)
