"""What ``grpo eval`` leaves: ``NAME.json`` with the numbers and all they depend on, ``NAME.jsonl`` with the samples."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from grpo.config import Recipe
from grpo.errors import RunError
from grpo.files import write_whole
from grpo.metrics import question_of
from grpo.run.folder import environment
from grpo.run.secrets import recipe_without_secrets

KEPT = ("started", "command", "host", "platform", "python", "packages", "source", "cpu", "gpus", "cuda", "threads")


def write_evaluation(
    folder: Path,
    name: str | None,
    recipe: Recipe,
    model: str,
    metrics: dict[str, float],
    rows: list[dict[str, Any]],
    *,
    suite: str = "",
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write an evaluation into ``folder`` as NAME.json and NAME.jsonl; returns the former.

    ``recipe`` is the one that was evaluated, ``rows`` are its completions (``metrics.rollout_rows``). Without ``name``
    the files are called after the model; those of a ``suite`` have its name behind that, and say its ``facts`` too.
    Files that exist stay: the new ones are then NAME-2. Raises RunError where the disk refuses.
    """
    called = f"{name or _called(model)}{f'-{suite}' if suite else ''}"
    stem = re.sub(r"[^\w.-]+", "-", called).strip("-.") or "model"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = (stem if n == 1 else f"{stem}-{n}" for n in itertools.count(1))
        free = next(n for n in names if not ((folder / f"{n}.json").exists() or (folder / f"{n}.jsonl").exists()))
        lines = [json.dumps({key: value for key, value in row.items() if key != "step"}) for row in rows]
        write_whole(folder / f"{free}.jsonl", "".join(f"{line}\n" for line in lines))
        said = {"model": model, "samples": f"{free}.jsonl"} | (facts or {}) | evaluation_facts(recipe, metrics, rows)
        write_whole(folder / f"{free}.json", json.dumps(said, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"{folder}: the evaluation can't be written: {error.strerror or error}") from error
    return folder / f"{free}.json"


def evaluation_facts(recipe: Recipe, metrics: dict[str, float], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, accuracy with its interval, how it was sampled, and where, as JSON values.

    ``counts.scored_prompts`` are those without an unscored completion, over which accuracy is a mean.
    """
    evaluation = recipe.evaluation
    judges = {source.label: recipe.judged_by(source.label) for source in recipe.data.sources()}
    prompts: dict[int, list[float | None]] = {}
    for row in rows:
        prompts.setdefault(row["prompt_id"], []).append(row["rewards"][judges[row.get("source", "")]])
    scored = {prompt: values for prompt, values in prompts.items() if None not in values}
    statuses = [row["status"] for row in rows]
    independent = evaluation.num_generations == 1 and len({question_of(row) for row in rows}) == len(prompts)
    return {
        "accuracy": metrics["eval/accuracy"],
        "interval": {
            "low": metrics["eval/accuracy_low"],
            "high": metrics["eval/accuracy_high"],
            "level": 0.95,
            "method": "Wilson" if independent else "clustered by question",
        },
        "counts": {
            "prompts": len(prompts),
            "scored_prompts": len(scored),
            "completions": len(rows),
            "solved": sum(value is not None and value >= 1 for values in scored.values() for value in values),
            "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
        },
        "judged_by": judges if recipe.data.mix else judges[""],
        "sampling": {
            "num_generations": evaluation.num_generations,
            "temperature": evaluation.temperature,
            "top_p": evaluation.top_p,
            "max_completion_length": evaluation.max_completion_length or recipe.rollout.max_completion_length,
            "stop": recipe.rollout.stop,
            "seed": recipe.training.seed,
            "backend": recipe.rollout.backend,
            "dtype": recipe.model.dtype,
        },
        "metrics": metrics,
        "task": recipe_without_secrets(recipe)["data"],
        "environment": {key: value for key, value in environment().items() if key in KEPT},
    }


def _called(model: str) -> str:
    """A model's name for a file: ``final``, ``step_000050``, ``Qwen-Qwen2.5-0.5B``."""
    path = Path(model)
    return path.name if path.is_dir() or model.startswith((".", "/")) else model
