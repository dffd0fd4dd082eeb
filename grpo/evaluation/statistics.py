"""What outcomes say of a model, and how surely: accuracy with its interval, pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95% interval of a proportion of independent trials (Wilson 1927).

    Its ends are the two p with |successes / trials - p| = z sqrt(p (1 - p) / trials). Near 0 and 1 it stays inside
    [0, 1] and keeps a width, which the normal interval does not.
    """
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def clustered_interval(solved_PG: np.ndarray, questions_P: Sequence[str]) -> tuple[float, float]:
    """95% interval of the accuracy where outcomes of the same question are correlated: mean +- z SE, cut to [0, 1].

    With n = P G outcomes y_i, their mean y and C clusters, a cluster being all completions of all rows with the same
    question:

        SE^2 = C / (C - 1) / n^2 * sum over clusters of (sum over the cluster's outcomes of (y_i - y))^2

    This is the cluster-robust variance of a mean (Liang & Zeger 1986; for evaluations of language models
    arXiv:2411.00640, eq. 4) with the usual factor for few clusters. Where no question repeats it is the variance of the
    prompts' means over P. One cluster alone says nothing about the spread: the interval is then the mean +- 1. Where
    every question has the same outcome (all solved, none solved) the interval has no width.
    """
    P, _ = solved_PG.shape
    accuracy = float(solved_PG.mean())
    _, cluster_P = np.unique(np.asarray(questions_P), return_inverse=True)
    deviations_C = np.bincount(cluster_P, weights=solved_PG.mean(1) - accuracy)
    C = len(deviations_C)
    half = Z_95 * math.sqrt(C / (C - 1) * float((deviations_C**2).sum())) / P if C > 1 else 1.0
    return max(0.0, accuracy - half), min(1.0, accuracy + half)


def pass_at_k(solved: int, samples: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples solves it: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374)."""
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def accuracy_metrics(solved_PG: np.ndarray, questions_P: Sequence[str]) -> dict[str, float]:
    """Accuracy, its 95% interval, and pass@k for k = 2, 4, 8, ... up to G.

    ``solved_PG`` is boolean; ``questions_P`` are the rows' questions. With one completion of each question the outcomes
    are independent and the interval is Wilson's. Otherwise it is ``clustered_interval``.
    """
    P, G = solved_PG.shape
    independent = G == 1 and len(set(questions_P)) == P
    low, high = wilson_interval(solved_PG.sum(), P) if independent else clustered_interval(solved_PG, questions_P)
    metrics = {"eval/accuracy": float(solved_PG.mean()), "eval/accuracy_low": low, "eval/accuracy_high": high}
    for k in (2**i for i in range(1, G.bit_length()) if 2**i <= G):
        metrics[f"eval/pass@{k}"] = float(np.mean([pass_at_k(int(row.sum()), G, k) for row in solved_PG]))
    return metrics
