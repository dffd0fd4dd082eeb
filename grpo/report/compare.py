"""Runs beside each other: what their recipes differ in, means over seeds with intervals, and a paired test on the
held-out prompts that they share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from grpo.config.given import given
from grpo.errors import UserError
from grpo.evaluation.statistics import Paired, paired_test, t_95
from grpo.metrics import question_of
from grpo.report.attempts import Attempts, attempts
from grpo.report.markup import short
from grpo.run.fields import COST
from grpo.run.read import RunRecord, headline, read_run

# Runs that differ in these alone are seeds of one recipe.
OF_A_SEED = {"training.seed", "training.output_dir", "tracking.run_name", "tracking.project"}
FACTS = {
    "accuracy before": "accuracy_before",
    "accuracy after": "accuracy_after",
    "gain": "gain",
    "length after": "length_after",
    "reward after": "reward_after",
    "seconds": "seconds",
    "dollars": "dollars",
}


@dataclass(frozen=True)
class Mean:
    """A mean over seeds. ``low`` and ``high`` are its 95% interval; None with one seed, of which nothing is known of
    how another would do."""

    value: float
    low: float | None
    high: float | None

    def text(self) -> str:
        form = "{:.3f}" if abs(self.value) < 10 else "{:.0f}"
        interval = "" if self.low is None else f" [{form.format(self.low)}, {form.format(self.high)}]"
        return form.format(self.value) + interval


@dataclass(frozen=True)
class Side:
    """Runs of one recipe with different seeds: a letter, and what sets its recipe apart. ``answers`` are their last
    evaluations, by prompt. Which prompts are held out may depend on the seed."""

    letter: str
    label: str
    runs: list[RunRecord]
    means: dict[str, Mean]
    answers: list[dict[str, Attempts]]

    def share(self, prompt: str) -> float:
        """How often the prompt was solved, over samples and the seeds that held it out."""
        return fmean(found[prompt].share for found in self.answers if prompt in found)

    def answer(self, prompt: str) -> Attempts:
        """That of the first run which held it out."""
        return next(found[prompt] for found in self.answers if prompt in found)


EXPLAINED = (
    "The test is the exact sign-flip test over questions (with one run and one completion a prompt, McNemar's): were "
    "there no difference, a question's would have either sign with the same chance. Its interval is Student's t, "
    "clustered by question. It says whether these models differ, not whether the recipes would with other seeds: for "
    "that, look at the intervals, which are Student's t over seeds."
)


def said_of(found: Paired | None, one: str, other: str, what: str = "shared held-out questions") -> str:
    """A test's result as a sentence. ``what`` are the questions."""
    if found is None:
        return (
            f"{other} and {one}: no test, for they share no held-out prompt whose completions were kept. With one "
            "data.args.seed in both, a task of grpo's holds out the same under every training.seed."
        )
    said = "may be chance" if found.p > 0.05 else "is more than chance"
    return (
        f"{other} does better than {one} on {found.better} of {found.questions} {what} and worse on {found.worse}: "
        f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}], p = {found.p:.2g}, which {said}."
    )


def tone_of(found: Paired | None) -> str:
    """Whether the other side is better or worse, as a colour of the page."""
    return "plain" if found is None or found.p > 0.05 else "good" if found.better > found.worse else "bad"


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """With its 95% interval, mean +- t s / sqrt(n)."""
    n, mean = len(values), fmean(values)
    if n < 2:
        return Mean(mean, None, None)
    half = t_95(n - 1) * stdev(values) / math.sqrt(n)
    return Mean(mean, mean - half, mean + half)


def compare(folders: Sequence[Path]) -> list[Side]:
    """The runs, by recipe, in the order given. Raises UserError where there are not two, or one cannot be read."""
    if len(folders) < 2:
        for folder in folders:
            read_run(folder)  # a folder of runs is told by their names
        raise UserError("compare takes two run folders or more: grpo compare RUN RUN ...")
    by_recipe: dict[str, list[tuple[RunRecord, dict[str, Any]]]] = {}
    for run in map(read_run, folders):
        keys = {name: value for name, value in given(run.recipe).items() if name not in OF_A_SEED}
        by_recipe.setdefault(json.dumps(keys, sort_keys=True, default=str), []).append((run, keys))
    groups = list(by_recipe.values())
    labels = _labels([group[0] for group in groups])
    return [
        _side(
            chr(ord("A") + i) if i < 26 else str(i + 1),
            f"{label} ({len(group)} seeds)" if len(group) > 1 else label,
            [run for run, _ in group],
        )
        for i, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def paired(one: Side, other: Side) -> Paired | None:
    """The test on the prompts that both sides have answered; None where there are none."""
    prompts = shared([one, other])
    if not prompts:
        return None
    ours, theirs = ([side.share(prompt) for prompt in prompts] for side in (one, other))
    return paired_test(ours, theirs, [prompt.partition(" ")[2] for prompt in prompts])


def shared(sides: Sequence[Side]) -> list[str]:
    """The prompts that every side has answered, in the order of their numbers."""
    sets = [{prompt for found in side.answers for prompt in found} for side in sides]
    return sorted(set.intersection(*sets), key=lambda prompt: (int(prompt.split(" ")[0]), prompt))


def _side(letter: str, label: str, runs: list[RunRecord]) -> Side:
    facts = [_facts(run) for run in runs]
    means = {
        name: mean_over_seeds([found[key] for found in facts])
        for name, key in FACTS.items()
        if all(key in found for found in facts)
    }
    return Side(letter, label, runs, means, [_answers(run) for run in runs])


def _facts(run: RunRecord) -> dict[str, float]:
    facts = {name: float(value) for name, value in headline(run).items()}
    if len(run.series("eval/accuracy")[0]) > 1:
        facts["gain"] = facts["accuracy_after"] - facts["accuracy_before"]
    if (dollars := facts.get(COST, facts.get("cost_usd"))) is not None:
        facts["dollars"] = dollars
    return facts


def _answers(run: RunRecord) -> dict[str, Attempts]:
    """By number and text of the prompt: two runs share a prompt where both are the same."""
    files = run.eval_rollouts()
    found = attempts(run, files[max(files)]) if files else {}
    return {f"{number} {question_of(one.row)}": one for number, one in found.items() if one.scored}


def _labels(firsts: Sequence[tuple[RunRecord, dict[str, Any]]]) -> list[str]:
    """Each recipe by the keys in which it differs from the others; by its first run's name where those are many."""
    recipes = [keys for _, keys in firsts]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    differ = [key for key in keys if len({str(recipe.get(key)) for recipe in recipes}) > 1]
    if not 0 < len(differ) <= 3:
        return [run.name for run, _ in firsts]
    return [
        ", ".join(
            f"{key.rpartition('.')[2]}={short(recipe.get(key, run.setting(key, 'default')), 30)}" for key in differ
        )
        for run, recipe in firsts
    ]
