"""Rejection sampling: n completions a prompt, of which rules keep some, as rows for ``stage: sft``.

A row holds the question, the answer to imitate, the task's columns, and under ``sampled`` where it comes from. What is
then trained on are the tokens that were sampled, the end among them: an answer whose text would become other tokens is
left out and counted (``same_tokens``). A model's own pieces are seldom those that its tokenizer would choose, but a row
of ids would be another model's as soon as the tokenizer is, and nobody could read it.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from grpo.config import Recipe
from grpo.errors import RunError, UserError
from grpo.files import write_whole
from grpo.pipeline.generate import Generated, Wanted, generate
from grpo.pipeline.keep import Row, Rule, apply, judge_of, pass_rate
from grpo.pipeline.sampled import model_hash, read_samples, recipe_hash
from grpo.prompts.task import Task
from grpo.scoring.grade import Completion, grader

TENTHS = (*(f"<={i / 10}" for i in range(1, 10)), "<1")  # of pass rates between none and all


def samples_of(output: Path) -> Path:
    """Where everything that was sampled for the rows in ``output`` is."""
    return output.with_suffix(".samples.jsonl")


def report_of(output: Path) -> Path:
    return output.with_suffix(".report.json")


def sample(recipe: Recipe, wanted: Wanted, rules: Sequence[Rule], output: Path) -> dict[str, Any] | None:
    """Sample, or go on with what was sampled for ``output``, and write rows and report. Returns the report, on the
    first process of a launch; None on the others.

    Other rules over the same samples sample nothing again.

    Raises:
        UserError: as ``generate``, and where the recipe has an environment.
        RunError: nothing is left to imitate; the report says after which rule.
    """
    if recipe.environment is not None:
        raise UserError(
            "environment: an episode of several turns is no row to imitate, which has one completion and nothing that "
            "was said to it meanwhile; leave the section out, or choose prompts with grpo data filter"
        )
    found = generate(recipe, wanted, samples_of(output))
    if os.environ.get("RANK", "0") != "0":
        return None
    with_tokens = _with_same_tokens(rules, found.task)
    rows, report = select(found, with_tokens, samples_of(output))
    try:
        write_whole(report_of(output), json.dumps(report, indent=2) + "\n")
        if rows:
            write_whole(output, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    except OSError as error:
        raise RunError(f"{output}: cannot be written: {error.strerror or error}") from error
    if not rows:
        emptied = next(step["rule"] for step in report["rules"] if not step["completions"])
        raise RunError(
            f"{emptied} leaves nothing of {report['completions']} completions to imitate ({report_of(output)}): keep "
            "by other rules, sample more (--n, --prompts), or from a better model"
        )
    return report


def select(found: Generated, rules: Sequence[Rule], file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that the rules keep, in the order of prompts and samples, and the report."""
    recipe, passes = found.recipe, _measured(rules, file, found.recipe.scoring.workers)
    rows, counted, first = [], _Counted(rules, recipe), 0
    origin = {
        "model": model_hash(found.header),
        "recipe": recipe_hash(found.header),
        "seed": found.header["recipe"]["training"]["seed"],
    }
    for group in read_samples(file):
        n = len(group["completions"])
        measures = {text: values[first : first + n] for text, values in passes.items()}
        after = apply(rules, group, range(n), measures)
        counted.add(group, after)
        rows += [row_to_imitate(group, g, origin, judge_of(recipe, group)) for g in after[-1]]
        first += n
    return rows, {**origin, **counted.report()}


def row_to_imitate(group: Row, g: int, origin: dict[str, Any], judge: str) -> dict[str, Any]:
    """A completion as a row for ``stage: sft``; ``origin`` says what it was sampled from."""
    completion = group["completions"][g]
    sampled = {
        **origin,
        "prompt_id": group["prompt_id"],
        "sample": g,
        "tokens": len(completion["token_ids"]),
        "verdict": completion["verdicts"][judge],
        "rewards": completion["rewards"],
        "pass_rate": pass_rate(group, judge),
    }
    text = group["prefill"] + completion["text"]
    return {**group["columns"], "prompt": group["prompt"], "completion": text, "sampled": sampled}


# --- rules that need a tokenizer or a reward -------------------------------------------------------------------------


def _with_same_tokens(rules: Sequence[Rule], task: Task) -> list[Rule]:
    """First that a completion ended, and, before any that compares, that its text becomes the same tokens."""

    def ended(row: Row, left: Sequence[int], measures: Any) -> list[int]:
        return [g for g in left if row["completions"][g]["status"] == "stop"]

    def same(row: Row, left: Sequence[int], measures: Any) -> list[int]:
        return [g for g in left if trained_on(task, row, g) == row["completions"][g]["token_ids"]]

    place = next((i for i, rule in enumerate(rules) if rule.compares), len(rules))
    return [Rule("ended", ended), *rules[:place], Rule("same_tokens", same), *rules[place:]]


def trained_on(task: Task, row: Row, g: int) -> list[int]:
    """The tokens that the supervised stage makes of a row; none where it would refuse the row."""
    text = row["prefill"] + row["completions"][g]["text"]
    return task.encode_answer(task.one_answer(text, row["prefill"])) if text.strip() else []


def _measured(rules: Sequence[Rule], file: Path, workers: int) -> dict[str, list[bool]]:
    """By rule, whether each completion of the file passes its measure."""
    found = {}
    for rule in rules:
        if rule.measure is not None:
            with grader(rule.measure.reward, workers) as judge:
                found[rule.text] = [rule.measure.passes(graded) for graded in judge.grade(_completions(file))]
    return found


def _completions(file: Path) -> Iterator[Completion]:
    for group in read_samples(file):
        for one in group["completions"]:
            yield Completion(
                one["text"],
                group["prompt"],
                status=one["status"],
                prefill=group["prefill"],
                token_ids=one["token_ids"],
            )


# --- the report ------------------------------------------------------------------------------------------------------


class _Counted:
    """What the rules left, by rule, and how many of a prompt's completions were right."""

    def __init__(self, rules: Sequence[Rule], recipe: Recipe) -> None:
        self.rules, self.recipe = rules, recipe
        self.left = [(0, 0)] * len(rules)  # completions and prompts after each
        self.rates: list[float] = []
        self.lengths: list[int] = []
        self.kept: list[int] = []
        self.verdicts: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.prompts = self.unscored = 0

    def add(self, group: Row, after: Sequence[Sequence[int]]) -> None:
        completions = group["completions"]
        self.left = [(c + len(left), p + bool(left)) for (c, p), left in zip(self.left, after, strict=True)]
        self.prompts += 1
        judge = judge_of(self.recipe, group)
        rate = pass_rate(group, judge)
        if rate is None:
            self.unscored += 1
        else:
            self.rates.append(rate)
        self.lengths += [len(one["token_ids"]) for one in completions]
        self.kept += [len(completions[g]["token_ids"]) for g in after[-1]]
        self.verdicts.update(one["verdicts"][judge] for one in completions)
        self.statuses.update(one["status"] for one in completions)

    def report(self) -> dict[str, Any]:
        rules = [
            {"rule": rule.text, "completions": completions, "prompts": prompts}
            for rule, (completions, prompts) in zip(self.rules, self.left, strict=True)
        ]
        return {
            "prompts": self.prompts,
            "completions": len(self.lengths),
            "rows": len(self.kept),
            "judged_by": ", ".join(dict.fromkeys(self.recipe.judged_by(s.label) for s in self.recipe.data.sources())),
            "rules": rules,
            "pass_rate": self._pass_rates(),
            "length": {"sampled": _lengths(self.lengths), "kept": _lengths(self.kept)},
            "verdicts": dict(sorted(self.verdicts.items())),
            "statuses": dict(sorted(self.statuses.items())),
        }

    def _pass_rates(self) -> dict[str, Any]:
        """``histogram`` counts prompts: none right, up to a tenth, up to two tenths, ..., above nine tenths, all."""
        ends = {0.0: "0", 1.0: "1"}
        tenths = Counter(ends.get(rate, TENTHS[math.ceil(round(rate * 10, 9)) - 1]) for rate in self.rates)
        return {
            "mean": fmean(self.rates) if self.rates else None,
            "unscored_prompts": self.unscored,
            "histogram": {name: tenths[name] for name in ("0", *TENTHS, "1")},
        }


def _lengths(tokens: Sequence[int]) -> dict[str, float] | None:
    if not tokens:
        return None
    values = np.asarray(tokens)
    return {
        "mean": round(float(values.mean()), 3),
        "median": float(np.median(values)),
        "p90": float(np.quantile(values, 0.9, method="higher")),
        "max": int(values.max()),
    }


def lines(report: dict[str, Any], output: Path) -> Iterator[str]:
    """The report for a terminal."""
    rates = report["pass_rate"]
    counts = rates["histogram"]
    some = sum(count for name, count in counts.items() if name not in ("0", "1"))
    yield (
        f"{report['completions']:,} completions of {report['prompts']:,} prompts, seed {report['seed']}; "
        f"model {report['model'][:12]}, recipe {report['recipe'][:12]}"
    )
    if rates["mean"] is not None:
        yield (
            f"pass rate {rates['mean']:.3f} ({report['judged_by']}): {counts['0']} prompts never solved, {some} "
            f"sometimes, {counts['1']} always, {rates['unscored_prompts']} without a score"
        )
    width = max(len(step["rule"]) for step in report["rules"])
    for step in report["rules"]:
        yield f"  {step['rule']:<{width}}  leaves {step['completions']:>8,} of {step['prompts']:,} prompts"
    sampled, kept = report["length"]["sampled"], report["length"]["kept"]
    yield f"mean length in tokens: sampled {sampled['mean']:.1f}, kept {kept['mean']:.1f}"
    yield f"{report['rows']:,} rows: {output}; {samples_of(output).name} has all samples, {report_of(output).name} this"
