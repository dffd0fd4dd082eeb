"""Intervals and the paired test of evaluations by simulation: ``python -m benchmarks.intervals``.

Questions have their own difficulty, drawn from a beta distribution, and each is answered several times. An interval
should hold the true accuracy in 95 of 100 evaluations, a test of two models that are alike should find a difference
(p <= 0.05) in 5 of 100. Takes half a minute on one core.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grpo.evaluation.statistics import Z_95, clustered, clustered_interval, paired_test, wilson_interval

TIMES = 2000
SUITES = {  # questions, samples, and the beta distribution of difficulty
    "AIME-like: 30 questions x 32, accuracy 0.30": (30, 32, 0.3, 0.7),
    "AIME-like, a small model: 30 x 32, accuracy 0.05": (30, 32, 0.1, 1.9),
    "MATH-500-like: 500 x 4, accuracy 0.50": (500, 4, 0.5, 0.5),
    "GPQA-like: 198 x 8, accuracy 0.30": (198, 8, 3.0, 7.0),
    "HumanEval-like: 164 x 1, accuracy 0.05": (164, 1, 0.1, 1.9),
}


def intervals() -> None:
    print("| suite | ours | mean +- z SE, clustered | Wilson over all completions |\n|---|---|---|---|")
    for name, (C, G, easy, hard) in SUITES.items():
        draw, truth = np.random.default_rng(0), easy / (easy + hard)
        questions = [str(i) for i in range(C)]
        held = np.zeros(3)
        for _ in range(TIMES):
            solved_CG = draw.random((C, G)) < draw.beta(easy, hard, C)[:, None]
            mean, error, _ = clustered(solved_CG.mean(1), questions)
            found: list[Any] = [
                clustered_interval(solved_CG, questions),
                (mean - Z_95 * error, mean + Z_95 * error),
                wilson_interval(solved_CG.sum(), solved_CG.size),
            ]
            held += [low <= truth <= high for low, high in found]
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in held / TIMES)} |")


def tests() -> None:
    print("\n| two models that are alike | p <= 0.05 | the difference's interval holds 0 |\n|---|---|---|")
    for name, (C, G, easy, hard) in SUITES.items():
        draw = np.random.default_rng(1)
        questions = [str(i) for i in range(C)]
        held = np.zeros(2)
        for _ in range(TIMES // 2):
            chance_C = draw.beta(easy, hard, C)
            one, other = (draw.binomial(G, chance_C) / G for _ in range(2))
            found = paired_test(one.tolist(), other.tolist(), questions)
            held += [found.p <= 0.05, found.low <= 0 <= found.high]
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in held / (TIMES // 2))} |")


if __name__ == "__main__":
    intervals()
    tests()
