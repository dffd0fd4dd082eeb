"""The rows of a recipe that are worth training on, and why each of the others is not.

In this order, so that nothing is sampled for a row that is left out anyway:

    overlong    its prompt (with `stage: sft`, or its completion) has more tokens than the recipe allows
    gold        a built-in reward can read no answer in it, so no completion could be right
    duplicate   an earlier row has the same words in the same order, whatever their case, punctuation and spacing
    near        an earlier row has the same words in any order, but for at most one that is no number, and each number
                stands beside the same word (``prompts/overlap.py``)
    pass_rate   the share of n sampled completions that are right is outside of the window
    unscored    none of them could be scored

Beside ``OUTPUT`` stand ``….samples.jsonl`` (``generate.py``: a killed process goes on), ``….dropped.jsonl`` and
``….report.json``. A recipe with `data.mix` gets a file of rows for each source.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.config import Recipe
from grpo.errors import RunError, UserError
from grpo.model.loading import load_tokenizer
from grpo.pipeline.decontaminate import dropped_of, report_of, write_results
from grpo.pipeline.generate import Wanted, generate
from grpo.pipeline.keep import judge_of, pass_rate
from grpo.pipeline.sample import samples_of
from grpo.pipeline.sampled import model_hash, read_samples, recipe_hash
from grpo.prompts.overlap import find_duplicates, question_text
from grpo.prompts.parts import Part
from grpo.prompts.rows import load_parts
from grpo.prompts.task import Task, load_task
from grpo.scoring.functions import row_checks

RULES = ("overlong", "gold", "duplicate", "near", "pass_rate", "unscored")


@dataclass(frozen=True)
class Window:
    """Pass rates that are kept, and the completions by which they are measured."""

    low: float
    high: float
    n: int
    chunk: int | None = None


@dataclass
class _Sieve:
    """Rows that are left out, by id: the rule, and what else is to be said."""

    part: Part
    dropped: dict[int, dict[str, Any]] = field(default_factory=dict)

    def drop(self, row: int, rule: str, **why: Any) -> None:
        self.dropped.setdefault(row, {"row": self.part.place(row), "rule": rule, **why})

    def left(self) -> list[int]:
        return [row for row in self.part.ids if row not in self.dropped]


def filter_rows(recipe: Recipe, window: Window | None, output: Path) -> dict[str, Any] | None:
    """Write the rows to train on that are left, with their pass rates, into ``output``. Returns the report, on the
    first process of a launch; None on the others. Without a window nothing is sampled, and no model is needed.

    Raises:
        UserError: as ``generate``.
        RunError: nothing is left; the report says why.
    """
    asked = recipe
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"too_long": "drop"})})
    sieve = _Sieve(load_parts(asked.data, asked.training, asked.stage, environment=asked.environment is not None).train)
    rates: dict[int, float] = {}
    sampled: dict[str, Any] = {}

    def choose(task: Task, rows: list[int]) -> list[int]:
        _without_sampling(recipe, task, sieve)
        return sorted(sieve.left())

    if window is None:
        choose(load_task(recipe, load_tokenizer(recipe.model)), [])
    else:
        found = generate(recipe, Wanted(window.n, chunk=window.chunk), samples_of(output), choose)
        sampled = {"model": model_hash(found.header), "recipe": recipe_hash(found.header), "n": window.n}
        sampled |= {"pass_rate": [window.low, window.high], "seed": recipe.training.seed}
    if os.environ.get("RANK", "0") != "0":
        return None
    if window is not None:
        rates = _by_pass_rate(recipe, window, samples_of(output), sieve)
    report = _report(sieve, rates, sampled)
    kept = _kept(sieve, rates, output)
    report["outputs"] = {str(file): len(rows) for file, rows in kept.items()}
    dropped = [sieve.dropped[row] for row in sieve.part.ids if row in sieve.dropped]
    write_results(output, report, dropped, kept)
    if not any(kept.values()):
        most = max(report["dropped"], key=lambda rule: report["dropped"][rule])
        raise RunError(
            f"no row of {report['rows']} is left; {most} takes {report['dropped'][most]} ({dropped_of(output)} says of "
            "each why)"
        )
    return report


# --- the rules -------------------------------------------------------------------------------------------------------


def _without_sampling(recipe: Recipe, task: Task, sieve: _Sieve) -> None:
    within = set(task.train.ids)
    limits = f"data.max_prompt_length ({recipe.data.max_prompt_length})"
    if recipe.stage == "sft":
        limits += f" or rollout.max_completion_length ({recipe.rollout.max_completion_length})"
    for row in sieve.part.ids:
        if row not in within:
            sieve.drop(row, "overlong", why=f"more tokens than {limits}")
    for reward, check in row_checks(recipe.functions()):
        for row in sieve.left():
            share = sieve.part.share(row)
            if reward.scores(share.source) and (why := check(share.row(row))) is not None:
                sieve.drop(row, "gold", why=f"{reward.name}: {why}")
    left = sieve.left()
    texts = [question_text(sieve.part.row(row)[sieve.part.share(row).data.prompt_column]) for row in left]
    for one in find_duplicates(texts):
        row, first = left[one.row], left[one.question]
        differ = _differing(sieve.part, row, first)
        rule = "duplicate" if one.how == "exact" else "near"
        sieve.drop(row, rule, of=sieve.part.place(first), prompt=texts[one.row], **differ)


def _differing(part: Part, row: int, first: int) -> dict[str, Any]:
    """The columns beside the question in which a row differs from the one that it repeats: another answer, say."""
    one, other = part.row(row), part.row(first)
    prompt = {part.share(row).data.prompt_column, part.share(first).data.prompt_column}
    names = [name for name in one if name not in prompt and one[name] != other.get(name)]
    return {"differs_in": names} if names else {}


def _by_pass_rate(recipe: Recipe, window: Window, samples: Path, sieve: _Sieve) -> dict[int, float]:
    """Drop by pass rates; returns the pass rates of all rows that were scored."""
    rates = {}
    for group in read_samples(samples):
        row, rate = group["prompt_id"], pass_rate(group, judge_of(recipe, group))
        if rate is None:
            verdicts = Counter(one["verdicts"][judge_of(recipe, group)] for one in group["completions"])
            sieve.drop(row, "unscored", verdicts=dict(sorted(verdicts.items())))
            continue
        rates[row] = rate
        if not window.low <= rate <= window.high:
            sieve.drop(row, "pass_rate", pass_rate=round(rate, 6))
    return rates


# --- what is written -------------------------------------------------------------------------------------------------


def _kept(sieve: _Sieve, rates: Mapping[int, float], output: Path) -> dict[Path, list[dict[str, Any]]]:
    """The rows that are left by the file that they go into."""
    left = set(sieve.left())
    found: dict[Path, list[dict[str, Any]]] = {}
    for share in sieve.part.shares:
        file = output.with_suffix(f".{share.source}.jsonl") if share.source else output
        rows = [row for row in share.ids if row in left]
        rated = [({"pass_rate": round(rates[row], 6)} if row in rates else {}) for row in rows]
        found[file] = [{**share.row(row), **rate} for row, rate in zip(rows, rated, strict=True)]
    return found


def _report(sieve: _Sieve, rates: Mapping[int, float], sampled: dict[str, Any]) -> dict[str, Any]:
    counts = Counter(why["rule"] for why in sieve.dropped.values())
    report: dict[str, Any] = {"rows": len(sieve.part), "kept": len(sieve.left())}
    report["dropped"] = {rule: counts[rule] for rule in RULES}
    if sampled:
        report["sampled"] = sampled | {
            "prompts": len(rates) + counts["unscored"],
            "mean_pass_rate": round(sum(rates.values()) / len(rates), 6) if rates else None,
            "never_right": sum(rate == 0 for rate in rates.values()),
            "always_right": sum(rate == 1 for rate in rates.values()),
        }
    if any(share.source for share in sieve.part.shares):
        left = set(sieve.left())
        report["by_source"] = {
            share.source: {"rows": len(share), "kept": sum(row in left for row in share.ids)}
            for share in sieve.part.shares
        }
    return report


def lines(report: dict[str, Any], output: Path) -> Iterator[str]:
    """The report for a terminal."""
    yield f"{report['kept']:,} of {report['rows']:,} rows are left"
    for rule, count in report["dropped"].items():
        if count:
            yield f"  {rule:<10}{count:>8,}"
    if "sampled" in report:
        of = report["sampled"]
        rate = "none" if of["mean_pass_rate"] is None else f"{of['mean_pass_rate']:.3f}"
        yield (
            f"mean pass rate {rate} over {of['prompts']:,} prompts, {of['n']} completions each: "
            f"{of['never_right']} never solved, {of['always_right']} always"
        )
    for file, count in report["outputs"].items():
        yield f"{count:,} rows: {file}"
    yield f"{dropped_of(output)} says of each other row why, {report_of(output).name} counts"


def check_filter(recipe: Recipe, window: Window | None) -> None:
    """Raise UserError where the recipe can't be filtered as asked."""
    if window is not None and not recipe.functions():
        raise UserError("--pass-rate needs rewards, which judge what is sampled, and the recipe has none")
