"""Speed of rewards: sandboxed programs a second beside plain subprocesses, and math verdicts beside math-verify's.

    python -m benchmarks.rewards [--rounds 5]

The sides of a comparison take turns in one run, on the same work, and medians are compared. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks import math_rewards
from rewards import code

PROGRAM = "def f(xs):\n    return sorted(set(xs))[::-1]\n"
TESTS = {"fn_name": "f", "inputs": [[[3, 1, 2, 3]], [[]]], "outputs": [[3, 2, 1], []]}
COMPLETION = f"<think>sort, then reverse</think>\n```python\n{PROGRAM}```"
PLAIN = PROGRAM + "assert f([3, 1, 2, 3]) == [3, 2, 1] and f([]) == []\n"


def sandboxed(_: int) -> None:
    assert code.verify(TESTS, COMPLETION).reward == 1.0


def plain(_: int) -> None:
    subprocess.run([sys.executable, "-c", PLAIN], check=True)


def bare(_: int) -> None:
    subprocess.run([sys.executable, "-I", "-S", "-c", PLAIN], check=True)


def per_second(act: Callable[[int], None], runs: int, threads: ThreadPoolExecutor) -> float:
    begun = time.perf_counter()
    list(threads.map(act, range(runs)))
    return runs / (time.perf_counter() - begun)


def programs(rounds: int, workers: int) -> dict[str, float | str]:
    """Full verdicts of the code reward, against subprocesses that only run the same program. ``workers`` at a time."""
    sides = {"sandboxed": (sandboxed, 400), "python -c": (plain, 40), "python -I -S -c": (bare, 80)}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    code.start(workers)
    level = code._sandbox().level
    with ThreadPoolExecutor(workers) as threads:
        per_second(sandboxed, 50, threads)
        for _ in range(rounds):
            for name, (act, runs) in sides.items():
                rates[name].append(per_second(act, runs, threads))
    code.stop()
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    print(f"\n{'programs, ' + str(workers) + ' at a time':32}{'a second':>10}{'lowest':>10}{'highest':>10}")
    for name, rate in rates.items():
        print(f"{name:32}{medians[name]:>10.0f}{min(rate):>10.0f}{max(rate):>10.0f}")
    return {
        "sandbox_level": level,
        "sandboxed_per_s": round(medians["sandboxed"], 1),
        "plain_per_s": round(medians["python -c"], 1),
        "sandboxed_to_plain_ratio": round(medians["sandboxed"] / medians["python -c"], 2),
        "sandboxed_to_bare_ratio": round(medians["sandboxed"] / medians["python -I -S -c"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    results = programs(arguments.rounds, arguments.workers) | math_rewards.measure(arguments.rounds)
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
