r"""Speed and correctness of the math reward, beside math-verify alone on the same texts.

    python -m benchmarks.math_rewards [--rounds 5]

Speed: 200 pairs as in training, 50 problems (GSM8K's and MATH's kinds) with 4 completions each. Ours is one call of
``math_reward``; math-verify's is its documented use, ``parse(gold)``, ``parse(completion)``, ``verify``, pair by pair.
Both take turns. Nothing is kept from one round to the next (new workers, empty caches). Medians are compared.
Correctness: the labelled pairs of the tests. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import math_verify

from rewards.math import expression as math_expression
from rewards.math import reward as math_rewards
from rewards.math import text as math_text

LABELLED = Path(__file__).parents[1] / "tests" / "rewards" / "math_labelled.jsonl"

# A gold answer and the answers of four completions.
PROBLEMS = r"""
72 | 72 | 72 | 70 | 144
18 | 18 | \$18 | 18 | 26
3 | 3 | 3 | 5 | 3
70000 | 70,000 | \$70000 | 70000 | 195000
540 | 540 | 540 \text{ meters} | 180 | 540
20 | 20 | 20 | 40 | 60
64 | 64 | \$64 | 80 | 64
260 | 260 | 260 \text{ sheep} | 140 | 260
160 | 160 | 200 | 160 \text{ minutes} | 100
45 | 45 | 45 | 45 \text{ miles} | 135
460 | 460 | \$460 | 450 | 460
366 | 366 | 366 | 246 | 366
694 | 694 | \$694.00 | 694 | 700
13 | 13 | 13 | 11 | 13
5 | 5 | 6 | 5 | 5.5
25 | 25 | 25\% | 25 | 30
104 | 104 | 104 | 96 | 104
109 | 109 | 109 | 110 | 109
80 | 80 | 80 | 80\% | 60
35 | 35 | 35 | 28 | 35
1430 | 1430 | 1,430 | 1430 | 1340
12.5 | 12.5 | \frac{25}{2} | 12 | 12.50
2 | 2 | 2 | x = 2 | -2
-1 | -1 | 1 | -1 | 0
1024 | 1024 | 2^{10} | 1024 | 512
17 | 17 | n = 17 | 16 | 17
10 | 10 | 10 | 10 | 15
\frac{3}{4} | \frac{3}{4} | 0.75 | \frac{3}{5} | \dfrac{3}{4}
-\frac{2}{3} | -\frac{2}{3} | \frac{2}{3} | -\frac23 | -\frac{2}{3}
\frac{1}{6} | \frac{1}{6} | \frac{1}{36} | 0.167 | \frac16
\frac{7}{25} | \frac{7}{25} | 0.28 | \frac{7}{24} | \frac{7}{25}
2\sqrt{3} | 2\sqrt{3} | \sqrt{12} | 3\sqrt{2} | 2\sqrt{3}
\sqrt{13} | \sqrt{13} | \sqrt{13} | 3.61 | \sqrt{5}
\frac{3\sqrt{5}}{5} | \frac{3\sqrt{5}}{5} | \frac{3}{\sqrt{5}} | \frac{\sqrt{5}}{5} | \frac{3}{5}
36\pi | 36\pi | 36\pi \text{ cm}^2 | 12\pi | 113.1
\frac{5\pi}{6} | \frac{5\pi}{6} | 150^\circ | \frac{\pi}{6} | \frac{5\pi}{6}
x^2-3x+2 | x^2-3x+2 | (x-1)(x-2) | x^2+3x+2 | x^2 - 3x + 2
2x+7 | 2x+7 | 2x - 7 | 7+2x | y = 2x+7
\frac{x+1}{x-2} | \frac{x+1}{x-2} | \frac{x-1}{x+2} | 1+\frac{3}{x-2} | \frac{x+1}{x-2}
6-5i | 6-5i | 6+5i | 6 - 5i | 1
(3,-4) | (3,-4) | (-4,3) | (3, -4) | \left(3,-4\right)
1,-2 | 1,-2 | -2, 1 | 1 | x=1 \text{ or } x=-2
[-2,7) | [-2,7) | [-2,7] | -2 \le x < 7 | (-2,7)
(-\infty,-1)\cup(3,\infty) | (-\infty,-1)\cup(3,\infty) | (-1,3) | x<-1 \text{ or } x>3 | (-\infty,-1]\cup[3,\infty)
\begin{pmatrix}1\\3\end{pmatrix} | \begin{pmatrix}1\\3\end{pmatrix} | \begin{bmatrix}1\\3\end{bmatrix} | (3,1) | 10
\text{(B)} | \text{(B)} | B | \text{(C)} | \text{(B)}
y=-\frac{1}{2}x+3 | y=-\frac{1}{2}x+3 | y=3-\frac{x}{2} | y=\frac{1}{2}x+3 | x+2y=6
\sin 2x | \sin 2x | 2\sin x\cos x | \cos 2x | \sin(2x)
\log_2 3 | \log_2 3 | \frac{\ln 3}{\ln 2} | \log_3 2 | \log_2 3
\sqrt[3]{4} | \sqrt[3]{4} | 2^{2/3} | \sqrt{4} | \sqrt[3]{4}
"""
REASONING = (
    "Let us go through it step by step. We first write down what is given, $a = 3$ and $b = 4$, and what is asked. "
    "Then we put the two equations together, which gives $2a + b = 10$, and simplify the left side. Since both terms "
    "are positive, only one case remains, and we check that it meets the condition of the problem. "
)


def typical_pairs() -> list[tuple[str, str]]:
    """Gold answers and completions."""
    pairs = []
    for line in PROBLEMS.strip().splitlines():
        gold, *answers = line.split(" | ")
        for i, answer in enumerate(answers):
            pairs.append((gold, f"{REASONING * (i + 1)}Therefore the answer is $\\boxed{{{answer}}}$."))
    return pairs


def ours(pairs: list[tuple[str, str]]) -> list[bool]:
    rewards = math_rewards.math_reward([""] * len(pairs), [text for _, text in pairs], [gold for gold, _ in pairs])
    return [reward == 1.0 for reward in rewards]


def math_verifys(pairs: list[tuple[str, str]]) -> list[bool]:
    """math-verify as its documentation uses it: a bare gold answer is given as LaTeX."""
    results = []
    for gold, text in pairs:
        gold = gold.rpartition("####")[2].strip() if "####" in gold else gold
        parsed = math_verify.parse(gold if "$" in gold or "\\boxed" in gold else f"${gold}$")
        results.append(bool(math_verify.verify(parsed, math_verify.parse(text))))
    return results


def forget() -> None:
    """New workers, and nothing kept from the pairs before."""
    math_rewards.stop()
    math_rewards._known.clear()
    for cached in (math_rewards._gold_of, math_text.canonical, math_text.as_written, math_expression.value):
        cached.cache_clear()
    math_rewards.start()


def speed(rounds: int) -> dict[str, Any]:
    pairs = typical_pairs()
    seconds: dict[str, list[float]] = {"ours": [], "math-verify": []}
    sides = {"ours": ours, "math-verify": math_verifys}
    math_verifys(pairs)  # its regular expressions are compiled at the first use
    for _ in range(rounds):
        forget()
        for name, judge in sides.items():
            begun = time.perf_counter()
            judge(pairs)
            seconds[name].append(time.perf_counter() - begun)
    to_workers = len(math_rewards._known)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["math-verify"] / medians["ours"]
    print(
        f"\n{f'{len(pairs)} pairs, {to_workers} of them in workers':40}{'ms a pair':>12}{'lowest':>10}{'highest':>10}"
    )
    for name, times in seconds.items():
        each = [1000 * t / len(pairs) for t in (medians[name], min(times), max(times))]
        print(f"{name:40}{each[0]:>12.3f}{each[1]:>10.3f}{each[2]:>10.3f}")
    print(f"{'math-verify / ours':40}{ratio:>12.1f}")
    return {
        "math_pairs": len(pairs),
        "math_pairs_in_workers": to_workers,
        "math_ms_a_pair": round(1000 * medians["ours"] / len(pairs), 3),
        "math_verify_ms_a_pair": round(1000 * medians["math-verify"] / len(pairs), 3),
        "math_speed_ratio": round(ratio, 1),
    }


def rightness() -> dict[str, Any]:
    """Wrong answers accepted (FP) and right ones refused (FN), in each set of labelled pairs."""
    rows = [json.loads(line) for line in LABELLED.read_text().splitlines()]
    dialect = [row for row in rows if "set" not in row]
    kinds = {
        "dialect": dialect,
        "dialect in one box": [row for row in dialect if row["completion"].startswith("The answer is $\\boxed{")],
        "formats": [row for row in rows if row.get("set") == "formats"],
    }
    result: dict[str, Any] = {}
    print(f"\n{'labelled pairs':40}{'FP':>12}{'of':>10}{'FN':>10}{'of':>10}")
    for kind, chosen in kinds.items():
        pairs = [(row["gold"], row["completion"]) for row in chosen]
        right = sum(row["correct"] for row in chosen)
        for name, judge in (("ours", ours), ("math-verify", math_verifys)):
            accepted = judge(pairs)
            false_positives = sum(a and not row["correct"] for a, row in zip(accepted, chosen, strict=True))
            false_negatives = sum(row["correct"] and not a for a, row in zip(accepted, chosen, strict=True))
            print(
                f"{name + ', ' + kind:40}{false_positives:>12}{len(chosen) - right:>10}{false_negatives:>10}{right:>10}"
            )
            key = f"{name.replace('-', '_')}_{kind.replace(' ', '_')}"
            result[f"{key}_fp"] = [false_positives, len(chosen) - right]
            result[f"{key}_fn"] = [false_negatives, right]
    return result


def measure(rounds: int) -> dict[str, Any]:
    """Both measurements, printed as tables and returned."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        return speed(rounds) | rightness()
    finally:
        math_rewards.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    print("\n" + json.dumps(measure(parser.parse_args().rounds)))
