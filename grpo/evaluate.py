"""Held-out accuracy: pass@1 with its interval, pass@k, length; the same code before, during and after training."""

from __future__ import annotations

import math
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object

from grpo.backends.base import Backend, Request, Sampling
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.metrics import completion_metrics, rollout_rows
from grpo.randomness import Stream, key
from grpo.types import Group, Prompt

if TYPE_CHECKING:
    from accelerate import Accelerator

    from grpo.scoring.scorer import Scorer

Z_95 = 1.959963984540054


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): honest near 0 and 1, where the normal one is not."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def pass_at_k(solved: int, samples: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples solves it: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374)."""
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def accuracy_metrics(solved_PG: np.ndarray) -> dict[str, float]:
    """``solved_PG`` booleans. With one completion a prompt the interval is Wilson's; with several, whose outcomes are
    correlated within a prompt, it is that of the mean over prompts."""
    P, G = solved_PG.shape
    accuracy = float(solved_PG.mean())
    if G == 1:
        low, high = wilson_interval(solved_PG.sum(), P)
    else:
        half = Z_95 * float(solved_PG.mean(1).std(ddof=1)) / math.sqrt(P) if P > 1 else 1.0
        low, high = max(0.0, accuracy - half), min(1.0, accuracy + half)
    metrics = {"eval/accuracy": accuracy, "eval/accuracy_low": low, "eval/accuracy_high": high}
    for k in (2**i for i in range(1, G.bit_length()) if 2**i <= G):
        metrics[f"eval/pass@{k}"] = float(np.mean([pass_at_k(int(row.sum()), G, k) for row in solved_PG]))
    return metrics


def evaluate(
    recipe: Recipe,
    prompts: list[Prompt],
    backend: Backend,
    scorer: Scorer,
    accelerator: Accelerator,
    *,
    version: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics and rollout rows of the held-out prompts, equal on every process; each process does its share.

    Draws depend on the seed, prompt and sample but not on the step: two evaluations differ by the weights alone.
    A completion counts as solved where the recipe's evaluation reward is at least 1. Prompts with a completion that
    could not be scored are left out of the accuracy and counted in ``eval/unscored/…``.
    """
    evaluation = recipe.evaluation
    sampling = Sampling(
        max_completion_length=evaluation.max_completion_length or recipe.rollout.max_completion_length,
        temperature=evaluation.temperature,
        stop=recipe.rollout.stop,
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = prompts[rank::world]
    requests = [
        Request(
            p, [key(recipe.training.seed, Stream.EVALUATION.value, p.id, g) for g in range(evaluation.num_generations)]
        )
        for p in mine
    ]
    groups = [Group(p, c) for p, c in zip(mine, backend.generate(requests, sampling, version), strict=True)]
    scorer.score(groups, version)
    groups = sorted(gather_object(groups), key=lambda group: group.prompt.id)

    name = evaluation.reward or next(iter(groups[0].rewards_by_function))
    # A prompt with a completion that could not be scored says nothing of the model (all unscored: nobody solved any).
    scored = [group for group in groups if None not in group.rewards_by_function[name]] or groups
    solved_PG = np.array([[r is not None and r >= 1 for r in group.rewards_by_function[name]] for group in scored])
    metrics = accuracy_metrics(solved_PG)
    metrics |= {f"eval/{k}": v for k, v in completion_metrics(groups).items()}
    for function in groups[0].rewards_by_function:
        values = [r for group in groups for r in group.rewards_by_function[function] if r is not None]
        metrics[f"eval/rewards/{function}/mean"] = float(np.mean(values)) if values else 0.0
        metrics[f"eval/unscored/{function}"] = float(
            sum(r is None for g in groups for r in g.rewards_by_function[function])
        )
    return metrics, rollout_rows(groups, version)


def evaluate_recipe(recipe: Recipe, model: str | None = None) -> dict[str, float]:
    """Held-out metrics of a recipe's model, or of another one, without a run folder: what ``grpo eval`` does."""
    from grpo.backends import find_backend, make_backend
    from grpo.model.policy import Policy
    from grpo.run.session import leave, make_accelerator, prepare_task
    from grpo.scoring.scorer import Scorer

    if model is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": model, "lora": None})})
    find_backend(recipe.rollout)
    accelerator = make_accelerator(recipe)
    tokenizer, stop_ids, task = prepare_task(recipe)
    if not task.eval_prompts:
        raise UserError("data.eval_size is 0: there is nothing to evaluate on")
    with Scorer(recipe.rewards, recipe.scoring) as scorer:
        scorer.check_columns(task.columns)
        policy = Policy(recipe, accelerator, tokenizer, stop_ids, needs_reference=False)
        with closing(make_backend(recipe, policy)) as backend:
            backend.sync(policy, 0)
            metrics, _ = evaluate(recipe, task.eval_prompts, backend, scorer, accelerator, version=0)
    leave(accelerator, policy)
    return metrics
