"""The suites of a run, evaluated before its first step, at its end, and where the recipe says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grpo.backends.base import Backend
from grpo.config import Recipe
from grpo.evaluation.suites import PreparedSuite, evaluate_suite, prepare, scorers, training_questions
from grpo.model.loading import load_configs
from grpo.prompts.task import Task
from grpo.run.evaluations import write_evaluation
from grpo.run.run import Run, due
from grpo.scoring.scorer import Scorer


@dataclass
class RunSuites:
    """The suites of a run with what scores them, and the step at which they were evaluated last."""

    prepared: list[PreparedSuite]
    scorers: list[Scorer]
    last: int = -1

    def due(self, run: Run) -> bool:
        """Whether they are evaluated with the held-out rows of this step. Every process calls it."""
        step = run.progress.step
        if not self.prepared or self.last == step:
            return False
        return step == 0 or due(run.recipe.evaluation.suites_every, step) or run.finished()

    def evaluate(self, run: Run, backend: Backend) -> dict[str, float]:
        """Evaluate them and write each into OUTPUT_DIR/eval. Returns metrics, ``eval/SUITE/accuracy`` and so on, on
        the first process. Every process calls it."""
        metrics: dict[str, float] = {}
        self.last = step = run.progress.step
        for suite, scorer in zip(self.prepared, self.scorers, strict=True):
            with run.log.phase(f"evaluating {suite.name}", len(suite.prompts)) as tell:
                found = evaluate_suite(suite, backend, scorer, run.accelerator, version=step, tell=tell)
            if run.accelerator.is_main_process:
                write_evaluation(
                    run.folder / "eval",
                    f"step_{step:06d}",
                    suite.recipe,
                    f"{run.folder} at step {step}",
                    found.metrics,
                    found.rows,
                    suite=suite.name,
                    facts=found.facts | {"step": step, "inputs": run.inputs},
                )
            metrics |= {f"eval/{suite.name}/{key.removeprefix('eval/')}": v for key, v in found.metrics.items()}
        return metrics


@contextmanager
def suites_of_run(recipe: Recipe, tokenizer: Any, task: Task) -> Iterator[RunSuites]:
    """The suites of ``evaluation.suites``, prepared before any weights are loaded. Raises UserError as ``prepare``."""
    prepared = []
    if recipe.evaluation.suites:
        trained_on = training_questions(task.train)
        configs, longest = load_configs(recipe.model), recipe.longest_sequence()
        prepared = prepare(recipe, tokenizer, configs, longest, trained_on=trained_on)
    with scorers(prepared) as opened:
        yield RunSuites(prepared, opened)
