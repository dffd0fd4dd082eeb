"""A run folder read back: its metrics, recipe and environment, for reports and benchmarks.

It works on finished, running and killed runs, on other machines, and needs no model.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grpo.config.find import shipped_recipes
from grpo.errors import UserError, first_line
from grpo.health.history import ROLLED_BACK

MOST_NAMED = 8  # runs in a message


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says. ``training`` and ``evaluation`` are the lines of metrics.jsonl, in the order of steps."""

    folder: Path
    training: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    """Lines that say when the run went back to its best model (``rollback.py``)."""

    def rows(self) -> list[dict[str, Any]]:
        """All lines as the run wrote them: a step, what it was evaluated to, and whether the run then went back."""
        parts = (self.training, self.evaluation, self.rollbacks)
        placed = [(row["step"], place, row) for place, part in enumerate(parts) for row in part]
        return [row for _, _, row in sorted(placed, key=lambda one: one[:2])]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric, where it was logged and finite."""
        rows = self.evaluation if name.startswith("eval/") else self.training
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)

    def names(self, prefix: str = "") -> list[str]:
        """Metrics that were ever logged, in order of appearance."""
        seen = dict.fromkeys(name for row in [*self.training, *self.evaluation] for name in row if name != "step")
        return [name for name in seen if name.startswith(prefix)]

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of the recipe by its dotted path, e.g. ``rollout.max_completion_length``."""
        value: Any = self.recipe
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    def number(self, path: str) -> float | None:
        """A setting that is a number; None where it is absent or something else."""
        value = self.setting(path)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def name(self) -> str:
        return str(self.setting("tracking.run_name") or self.folder.resolve().name)

    @property
    def steps(self) -> int:
        return max(row["step"] for row in [*self.training, *self.evaluation])

    def eval_rollouts(self) -> dict[int, Path]:
        """Files of held-out completions by step, in order."""
        files = {file.stem.removeprefix("eval_"): file for file in (self.folder / "rollouts").glob("eval_*.jsonl")}
        return {int(step): files[step] for step in sorted(files) if step.isdecimal()}


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises UserError where it has no metrics, or where a file in it is not what it should be."""
    if not folder.is_dir():
        raise UserError(no_run(folder))
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(f"{folder}: is not a run folder (there is no metrics.jsonl in it){runs_nearby(folder)}")
    training: dict[int, dict[str, Any]] = {}
    evaluation: dict[int, dict[str, Any]] = {}
    rollbacks: dict[int, dict[str, Any]] = {}
    for number, row in _numbered(metrics):
        if wrong := [name for name, value in row.items() if not _is_number(value)]:
            raise UserError(f"{metrics}:{number}: {wrong[0]} is {_brief(row[wrong[0]])}, and not a number")
        kind = evaluation if any(name.startswith("eval/") for name in row) else training
        kind = rollbacks if ROLLED_BACK in row else kind
        kind[row["step"]] = row  # of lines with the same step (a copied log, an older resume) the last counts
    if not training and not evaluation:
        raise UserError(f"{metrics} is empty: the run has not finished its first step")
    recipe_text = _text(folder / "recipe.yaml")
    try:
        recipe = yaml.safe_load(recipe_text) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{folder / 'recipe.yaml'}: not readable as YAML: {first_line(error)}") from None
    try:
        environment = json.loads(_text(folder / "environment.json") or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'environment.json'}: not readable as JSON: {first_line(error)}") from None
    for name, content in (("recipe.yaml", recipe), ("environment.json", environment)):
        if not isinstance(content, dict):
            raise UserError(f"{folder / name}: expected keys with values, got {_brief(content)}")
    return RunRecord(
        folder=folder,
        training=[training[step] for step in sorted(training)],
        evaluation=[evaluation[step] for step in sorted(evaluation)],
        recipe=recipe,
        recipe_text=recipe_text,
        environment=environment,
        rollbacks=[rollbacks[step] for step in sorted(rollbacks)],
    )


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file that a run may still be writing: an unfinished last line is left out. Raises UserError where the
    file is not what a run writes."""
    return (row for _, row in _numbered(path))


def read_rollouts(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file of completions, each with the types that a run gives them. Raises UserError as above."""
    for number, row in _numbered(path):
        for name, right in _ROLLOUT.items():
            if row.get(name) is not None and not right(row[name]):
                raise UserError(f"{path}:{number}: {name} is {_brief(row[name])}, which no run writes")
        yield row


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) < 1e300) or value != value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_ROLLOUT: dict[str, Callable[[Any], bool]] = {
    "prompt_id": _is_whole,
    "sample": _is_whole,
    "reward": _is_number,
    "rewards": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "columns": lambda value: isinstance(value, dict),
}


def _numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of ``read_jsonl`` with the numbers of their lines."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline after it
                return
            raise UserError(f"{path}:{number}: not a line of JSON ({error})") from error
        if row is None:
            continue
        if not isinstance(row, dict) or not _is_whole(row.get("step")):
            raise UserError(f'{path}:{number}: not a row of a run (no integer "step")')
        yield number, row


def _text(path: Path) -> str:
    """A file that the report can do without."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping; else an empty one, for facts that a report can do without."""
    return value if isinstance(value, dict) else {}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def no_run(folder: Path) -> str:
    """Why there is no run at ``folder``, which is no folder; with what may be meant."""
    if folder.exists():
        owner = next((parent for parent in folder.parents if _holds_run(parent)), None)
        return f"{folder}: is a file, and not a run folder" + (f"; it is of the run {owner}" if owner else "")
    if str(folder) in shipped_recipes():
        return f"{folder}: is a recipe, and not a run folder; a run lies where its training.output_dir says"
    runs = {path.name: path for path in folder.parent.glob("*") if _holds_run(path)}
    near = difflib.get_close_matches(folder.name, runs, n=1)
    meant = f", did you mean {runs[near[0]]}?" if near else f"; there are {_named(runs.values())}" if runs else ""
    return f"{folder}: no such run folder{meant}"


def runs_nearby(folder: Path) -> str:
    """What may be meant by a folder that is no run: the run that it is a part of, or those inside of it."""
    if _holds_run(folder):
        return ""
    if owner := next((parent for parent in folder.parents if _holds_run(parent)), None):
        return f"; it is of the run {owner}"
    runs = [path for path in folder.glob("*") if _holds_run(path)]
    return f"; runs inside it: {_named(runs)}" if runs else ""


def _named(runs: Iterable[Path]) -> str:
    names = sorted(map(str, runs))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _holds_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists()


def headline(run: RunRecord) -> dict[str, float]:
    """The main numbers of a run: before and after, seconds, tokens. Absent where they were not measured.

    Accuracy and length are those of the held-out tasks at the first and the last evaluation; a run without any has the
    training length instead. ``seconds`` are those spent in training steps; evaluation and saving are not in it.
    """
    facts: dict[str, float] = {"steps": float(run.steps)}
    pairs = {
        "accuracy": "eval/accuracy",
        "accuracy_low": "eval/accuracy_low",
        "accuracy_high": "eval/accuracy_high",
        "length": "eval/completions/mean_length" if run.evaluation else "completions/mean_length",
        "turns": "eval/completions/mean_turns" if run.evaluation else "completions/mean_turns",
        "calls": "eval/tools/call_frequency" if run.evaluation else "tools/call_frequency",
        "loss": "eval/loss" if "eval/loss" in run.names() else "loss",
        "reward": "reward",
        "teacher": "eval/teacher_kl" if "eval/teacher_kl" in run.names() else "teacher/kl",
    }
    for fact, name in pairs.items():
        _, values = run.series(name)
        if len(values):
            few = 1 if name.startswith("eval/") else max(1, len(values) // 20)  # single training steps are noisy
            facts[f"{fact}_before"], facts[f"{fact}_after"] = values[:few].mean(), values[-few:].mean()
    for fact, name, reduce in (
        ("seconds", "step_time", np.sum),
        ("tokens", "num_tokens", np.max),
        ("tokens_per_second", "tokens_per_second", np.mean),
        ("cost_usd", "cost_usd", np.max),
        ("cost_usd_wall_clock", "cost_usd_wall_clock", np.max),
    ):
        _, values = run.series(name)
        if len(values):
            facts[fact] = float(reduce(values))
    return facts
