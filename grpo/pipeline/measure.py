"""A model measured on held-out tasks over several seeds: accuracy, length, form. The weights are loaded once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from grpo.backends import check_engine, find_backend, make_backend, resolve_backend
from grpo.config import Recipe
from grpo.config.load import load_recipe
from grpo.environments.prepared import prepared
from grpo.errors import RunError, UserError
from grpo.evaluation.held_out import evaluate
from grpo.evaluation.statistics import accuracy_metrics, clustered_interval
from grpo.files import write_whole
from grpo.metrics import question_of
from grpo.model.policy import Policy
from grpo.run.session import leave, make_accelerator, on_main, resolve_dtype
from grpo.scoring.scorer import Scorer

Found = dict[str, Any]


def measure(request: Path) -> Found:
    """Do what the JSON file ``request`` asks for (``recipe``, ``overrides``, ``seeds``, ``form``, ``hash``).

    The figures are written beside it, ``evaluation.json``, and every completion: ``evaluation.jsonl``. All processes
    of a launch call it.
    """
    asked, began = json.loads(request.read_bytes()), perf_counter()
    recipe = load_recipe(asked["recipe"], asked["overrides"])
    find_backend(recipe)
    accelerator = make_accelerator(recipe)
    recipe = resolve_backend(resolve_dtype(recipe, accelerator), accelerator)
    check_engine(recipe.rollout)
    rows: list[dict[str, Any]] = []
    policy = None
    with ExitStack() as opened:
        scorer = opened.enter_context(Scorer(recipe.functions(), recipe.scoring))
        of_seeds = [recipe.model_copy(update={"training": _seeded(recipe, seed)}) for seed in asked["seeds"]]
        of_recipes = [opened.enter_context(prepared(of_seed)) for of_seed in of_seeds]
        for of_recipe in of_recipes:
            if not of_recipe.task.eval_prompts:
                raise UserError("data.eval_size is 0: there is nothing to evaluate on")
            scorer.check_columns(of_recipe.task.columns)
        tokenizer, stop_ids = of_recipes[0].tokenizer, of_recipes[0].stop_ids
        policy = Policy(recipe, accelerator, tokenizer, stop_ids, needs_reference=False)
        with closing(make_backend(recipe, policy)) as backend:
            backend.sync(policy, 0)
            for of_seed, (_, _, task, episodes) in zip(of_seeds, of_recipes, strict=True):
                _, found = evaluate(
                    of_seed, task.eval_prompts, backend, scorer, accelerator, version=0, episodes=episodes
                )
                rows += [{"seed": of_seed.training.seed} | row for row in found]
    figures = {"hash": asked["hash"], "model": recipe.model.name} | figures_of(rows, recipe.judged_by(), asked["form"])
    figures["seconds"] = round(perf_counter() - began, 3)
    on_main(accelerator, lambda: _write(request.parent, figures, rows))
    leave(accelerator, policy)
    return figures


def figures_of(rows: Sequence[Mapping[str, Any]], judge: str, form: str | None) -> Found:
    """Accuracy by reward ``judge`` (at least 1 is solved), mean length in tokens, and the mean of reward ``form``, with
    95% intervals over questions. Prompts with a completion that ``judge`` could not score are left out and counted."""
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["seed"], row["prompt_id"]), []).append(row)
    scored = {place: group for place, group in groups.items() if None not in _judged(group, judge)}
    if not scored:
        raise RunError(f"{judge} could score no completion of the held-out tasks")
    accuracy = _accuracy(scored, judge)
    by_seed = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        part = {place: group for place, group in scored.items() if place[0] == seed}
        by_seed.append({"seed": seed} | (_accuracy(part, judge) if part else {}))
    found: Found = accuracy | {
        "length": round(float(np.mean([row["num_tokens"] for row in rows])), 3),
        "cut_off": round(float(np.mean([row["status"] == "length" for row in rows])), 6),
        "judged_by": judge,
        "tasks": len(scored),
        "unscored_tasks": len(groups) - len(scored),
        "completions": len(rows),
        "by_seed": by_seed,
    }
    formed = {place: group for place, group in groups.items() if form and None not in _values(group, form)}
    if formed and form:
        values_PG = np.array([_values(group, form) for group in formed.values()], dtype=float)
        low, high = _interval(values_PG, [question_of(group[0]) for group in formed.values()])
        found |= {"form": round(float(values_PG.mean()), 6), "form_low": round(low, 6), "form_high": round(high, 6)}
        found |= {"form_by": form}
    return found


def _interval(values_PG: np.ndarray, questions_P: Sequence[str]) -> tuple[float, float]:
    """``clustered_interval`` of values in any range: cut to the range that they have, as that is to [0, 1]."""
    least, width = float(values_PG.min()), float(np.ptp(values_PG))
    if width == 0:
        return least, least
    low, high = clustered_interval((values_PG - least) / width, questions_P)
    return least + width * low, least + width * high


def _accuracy(groups: Mapping[Any, Sequence[Mapping[str, Any]]], judge: str) -> dict[str, float]:
    solved_PG = np.array([[value >= 1 for value in _judged(group, judge)] for group in groups.values()])
    metrics = accuracy_metrics(solved_PG, [question_of(group[0]) for group in groups.values()])
    return {name.removeprefix("eval/"): round(value, 6) for name, value in metrics.items()}


def _values(group: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [row["rewards"][name] for row in group]


def _judged(group: Sequence[Mapping[str, Any]], judge: str) -> list[Any]:
    """What the reward gave that judges; of a source of `data.mix` its own."""
    return _values(group, group[0].get("judged_by", judge))


def _seeded(recipe: Recipe, seed: int) -> Any:
    return recipe.training.model_copy(update={"seed": seed})


def _write(folder: Path, figures: Found, rows: Sequence[Mapping[str, Any]]) -> None:
    dumped = [json.dumps(row, default=str) for row in rows]
    try:
        write_whole(folder / "evaluation.jsonl", "".join(f"{line}\n" for line in dumped))
        write_whole(folder / "evaluation.json", json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"{folder}: the evaluation can't be written: {error.strerror or error}") from error
