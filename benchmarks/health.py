"""Every rule of health beside two real runs of the tiny model: one that it names, and one that comes near.

    python -m benchmarks.health [--rules NAME ...] [--page]

Each run is a `grpo train` of `recipes/smoke_cpu.yaml` with other settings, on the committed base model. The table has
the figure that the rule looks at where it was worst, the rule's threshold, what the run said (other rules too, where
they can't be kept apart), and seconds of the command. `--page` writes the table into docs/results/health.md between its
markers. The last line is one JSON object, and the exit code 1 if a rule was silent or spoke where it should not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.algorithms import put
from benchmarks.common import ROOT, hardware, print_table, versions
from grpo.health.history import History
from grpo.health.rules import RULES, STEPS
from grpo.run.read import read_jsonl

PAGE = ROOT / "docs/results/health.md"
BEGIN, END = "<!-- begin: benchmarks.health -->", "<!-- end: benchmarks.health -->"

REWARDS = """
import time
import zlib
def number(text): return zlib.crc32(text.encode())
def luck(completions, **_):
    "1 for every second text"
    return [float(number(c) % 2) for c in completions]
def luck_of_few(prompts, completions, share, **_):
    "luck in a share of the groups; the others are paid alike"
    return luck(completions) if number(prompts[0]) % 1000 < 1000 * share else [0.0] * len(completions)
def nearest(completions, completion_ids, length, **_):
    "1 for the one of a group whose length is nearest to this, so its mean never changes"
    best = min(range(len(completions)), key=lambda i: (abs(len(completion_ids[i]) - length), i))
    return [float(i == best) for i in range(len(completions))]
def rare(completions, trainer_state, step, times, **_):
    "luck, and in one step so many times as much"
    return [value * (times if trainer_state.global_step == step else 1) for value in luck(completions)]
def plainest(completions, completion_ids, **_):
    "1 for the one of a group that has the fewest different tokens for its length"
    best = min(range(len(completions)), key=lambda i: (len(set(completion_ids[i])) / len(completion_ids[i]), i))
    return [float(i == best) for i in range(len(completions))]
ended = None
def slow(completions, share, **_):
    "luck that takes a share of the time, on any machine: the rest is what has passed since the call before"
    global ended
    if ended is not None:
        time.sleep((time.monotonic() - ended) * share / (1 - share))
    ended = time.monotonic()
    return luck(completions)
def unsure(completions, share, **_):
    "luck, and nothing for a share of the completions"
    return [None if number(c) // 2 % 1000 < 1000 * share else value for c, value in zip(completions, luck(completions))]
"""
BACKEND = """
from examples.my_backend import PlainBackend
class Shifted(PlainBackend):
    by = {by}
    def completion(self, ids, logps): return super().completion(ids, [logp - self.by for logp in logps])
"""


@dataclass(frozen=True)
class Case:
    """A rule: the figure that it looks at and where it begins to hold; overrides of a run that it names (with others
    ``beside`` it, where they can't be kept apart), and of one that it does not. ``most``: large figures are bad."""

    figure: Callable[[History], float]
    threshold: float
    fails: list[str]
    near: list[str]
    beside: tuple[str, ...] = ()
    most: bool = True


def metric(name: str) -> Callable[[History], float]:
    return lambda history: history.mean(name)


def correct(history: History) -> float:
    of = history.verdicts["countdown"]
    return of["correct"] if history.steps >= 4 * STEPS and of["wrong"] else math.nan


def below_start(history: History) -> float:
    """From the first evaluation's lower end up to the last one's upper end."""
    return history.evaluations[-1].high - history.evaluations[0].low if history.evaluations else math.nan


def below_best(history: History) -> float:
    """The same from the best evaluation, where the steps before the last were paid more."""
    if not history.evaluations:
        return math.nan
    best, last = max(history.evaluations, key=lambda one: one.accuracy), history.evaluations[-1]
    before = best.reward if best.reward == best.reward else history.mean_at_start("reward")
    return last.high - best.low if last.reward > before else math.nan


def ratio(name: str) -> Callable[[History], float]:
    return lambda history: history.mean(name) / history.mean_at_start(name)


def cases(folder: Path) -> dict[str, Case]:
    """``folder`` gets the code that the runs use."""
    (folder / "rewards_of_health.py").write_text(REWARDS)
    for name, by in (("far", 0.15), ("near", 0.07)):
        (folder / f"backend_{name}.py").write_text(BACKEND.format(by=by))

    def paid(name: str, **args: float) -> str:
        return f"rewards=[{{path: '{folder}/rewards_of_health.py:{name}', args: {json.dumps(args)}}}]"

    def targets(low: int, high: int) -> str:
        numbers = "min_numbers: 3, max_numbers: 3, min_number: 1, max_number: 9"
        return f"data.args={{question: compact, {numbers}, min_target: {low}, max_target: {high}}}"

    luck = paid("luck")
    wrong = "rewards=[{name: countdown, weight: -1.0}]"  # the wrong answers are paid
    evaluated = ["evaluation.at_start=true", "data.eval_size=256"]
    long_run = ["training.max_steps=30", "optimizer.warmup_steps=10"]
    return {
        "no_signal": Case(
            metric("frac_reward_zero_std"),
            0.95,
            [paid("luck_of_few", share=0.01), "training.prompts_per_step=16"],
            [paid("luck_of_few", share=0.1), "training.prompts_per_step=16"],
        ),
        "all_alike": Case(
            metric("completions/unique_ratio"),
            0.3,
            [luck, "rollout.top_k=1"],  # which leaves no group a signal
            [luck, "rollout.temperature=0.03"],
            beside=("no_signal",),
            most=False,
        ),
        "never_correct": Case(
            correct,
            0.0,
            [
                targets(400, 648),
                "data.eval_size=4",
                "training.prompts_per_step=4",
                "rollout.temperature=0.3",
                "training.max_steps=21",
            ],
            [targets(200, 648), "training.max_steps=21"],
            beside=("no_signal",),
            most=False,
        ),
        "accuracy_below_start": Case(
            below_start,
            0.0,
            [wrong, *evaluated, "training.max_steps=9", "optimizer.learning_rate=1e-3"],
            [wrong, *evaluated, "training.max_steps=9", "optimizer.learning_rate=2e-4"],
            most=False,
        ),
        "reward_without_accuracy": Case(
            below_best,
            0.0,
            [wrong, *evaluated, "training.max_steps=15", "optimizer.learning_rate=4e-4"],
            [wrong, *evaluated, "training.max_steps=15", "optimizer.learning_rate=2e-4"],
            beside=("accuracy_below_start",),
            most=False,
        ),
        "length_collapse": Case(
            ratio("completions/mean_length"),
            0.25,
            [paid("nearest", length=7), *long_run, "optimizer.learning_rate=1e-3"],
            [paid("nearest", length=8), *long_run, "optimizer.learning_rate=1e-3"],
            beside=("entropy_collapse",),
            most=False,
        ),
        "entropy_collapse": Case(
            metric("entropy"),
            0.02,
            [paid("plainest"), *long_run, "optimizer.learning_rate=1e-3"],
            [luck, "rollout.temperature=0.03", "training.max_steps=11"],
            beside=("cut_off",),
            most=False,
        ),
        "cut_off": Case(
            metric("completions/clipped_ratio"),
            0.5,
            [luck, "rollout.max_completion_length=24"],
            [luck, "rollout.max_completion_length=32"],
        ),
        "kl_blow_up": Case(
            metric("kl"),
            1.0,
            [luck, "algorithm.beta=1e-6", "training.max_steps=10", "optimizer.learning_rate=1e-3"],
            [luck, "algorithm.beta=1e-6", "training.max_steps=10", "optimizer.learning_rate=6e-4"],
        ),
        "clipped": Case(
            metric("clip_ratio/region_mean"),
            0.3,
            [luck, "algorithm.num_iterations=8", "algorithm.epsilon=0.001", "optimizer.learning_rate=3e-3"],
            [luck, "algorithm.num_iterations=4", "algorithm.epsilon=0.002", "optimizer.learning_rate=1e-3"],
        ),
        "sampler_mismatch": Case(
            metric("sampling/sampling_logp_difference/mean"),
            0.1,
            [luck, f"rollout.backend={folder}/backend_far.py:Shifted", "training.prompts_per_step=2"],
            [luck, f"rollout.backend={folder}/backend_near.py:Shifted", "training.prompts_per_step=2"],
        ),
        "gradient": Case(
            lambda history: history.mean("grad_norm", 1) / history.usual("grad_norm"),
            20.0,
            [paid("rare", step=11, times=60), "algorithm.scale_rewards=none", "training.max_steps=12"],
            [paid("rare", step=11, times=20), "algorithm.scale_rewards=none", "training.max_steps=12"],
        ),
        "slow_reward": Case(
            lambda history: history.mean("time/score") / history.mean("step_time"),
            0.5,
            [paid("slow", share=0.6), "training.prompts_per_step=1", "scoring.workers=1"],
            [paid("slow", share=0.15), "training.prompts_per_step=1", "scoring.workers=1"],
        ),
        "unscored": Case(
            metric("frac_unscored"),
            0.05,
            [paid("unsure", share=0.09)],
            [paid("unsure", share=0.04)],
        ),
    }


def run(overrides: list[str], folder: Path) -> tuple[list[dict[str, Any]], float]:
    """The metrics of a run, and seconds of the command. Raises RuntimeError where it fails."""
    plain = ["evaluation.at_start=false", "training.eval_every=0", "training.save_every=0", "data.eval_size=8"]
    plain += ["training.max_steps=7", "training.log_rollouts_every=0", "optimizer.learning_rate=1e-6"]
    command = [sys.executable, "-m", "grpo", "train", "smoke_cpu", *plain, *overrides]
    begun = time.perf_counter()
    done = subprocess.run([*command, f"training.output_dir={folder}"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return list(read_jsonl(folder / "metrics.jsonl")), time.perf_counter() - begun


def worst(case: Case, rows: list[dict[str, Any]]) -> float:
    """The figure where it was worst; nan if the run never had it."""
    history, found = History(STEPS), []
    for row in rows:
        history.add(row)
        if not math.isnan(value := case.figure(history)):
            found.append(value)
    return (max if case.most else min)(found, default=math.nan)


def beside(name: str, case: Case, folder: Path) -> dict[str, dict[str, Any]]:
    """Both runs of a rule."""
    found = {}
    for kind, overrides in (("fails", case.fails), ("near", case.near)):
        rows, seconds = run(overrides, folder / f"{name}_{kind}")
        said = {key.removeprefix("health/") for row in rows for key in row if key.startswith("health/")}
        right = said == {name, *case.beside} if kind == "fails" else not said
        found[kind] = {
            "figure": worst(case, rows),
            "holds": "above" if case.most else "below",
            "threshold": case.threshold,
            "said": name in said,
            "beside": sorted(said - {name}),
            "right": right,
            "seconds": seconds,
            "overrides": [one.replace(str(folder), "FOLDER") for one in overrides],
        }
        print(name, kind, found[kind], flush=True)
    return found


def page(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The table as Markdown."""
    lines = [
        BEGIN,
        "| rule | holds | a run that fails | said | one that comes near | said | seconds |",
        "|---" * 7 + "|",
    ]
    for name, kinds in found.items():
        cells = [name, f"{kinds['fails']['holds']} {kinds['fails']['threshold']:g}"]
        for kind in kinds.values():
            others = f", and {' and '.join(kind['beside'])}" if kind["beside"] else ""
            cells += [f"{kind['figure']:.3g}", ("yes" if kind["said"] else "no") + others]
        cells.append(" + ".join(f"{kind['seconds']:.0f}" for kind in kinds.values()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [rule.name for rule in RULES]
    parser.add_argument("--rules", nargs="+", choices=names, default=names)
    parser.add_argument("--page", action="store_true", help="write the table into docs/results/health.md")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        made = cases(Path(folder))
        found = {name: beside(name, made[name], Path(folder)) for name in options.rules}
    rows = {f"{name}, {kind}": one for name, kinds in found.items() for kind, one in kinds.items()}
    shown = ("figure", "threshold", "said", "right", "seconds")
    print_table("rules of health", {title: {key: row[key] for key in shown} for title, row in rows.items()})
    if options.page:
        put(page(found), PAGE, "# Rules of health beside runs that fail")
    print(json.dumps({"hardware": hardware(), "versions": versions(), "rules": found}))
    return 0 if all(row["right"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
