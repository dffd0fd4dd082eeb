"""Held-out accuracy: pass@1 with its interval, pass@k, length; the same code before, during and after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from grpo.backends.base import Backend, Request, Sampling
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.metrics import completion_metrics, rollout_rows
from grpo.randomness import Stream, key
from grpo.run.agreement import check_drawn
from grpo.run.exchange import gather_groups
from grpo.types import Group, Prompt

if TYPE_CHECKING:
    from accelerate import Accelerator

    from grpo.scoring.scorer import Scorer

Z_95 = 1.959963984540054


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95% interval of a proportion of independent trials (Wilson 1927).

    Its ends are the two p with |successes / trials - p| = z sqrt(p (1 - p) / trials). Near 0 and 1 it stays inside
    [0, 1] and keeps a width, which the normal interval does not.
    """
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def clustered_interval(solved_PG: np.ndarray, questions_P: Sequence[str]) -> tuple[float, float]:
    """95% interval of the accuracy where outcomes of the same question are correlated: mean +- z SE, cut to [0, 1].

    With n = P G outcomes y_i, their mean y and C clusters, a cluster being all completions of all rows with the same
    question:

        SE^2 = C / (C - 1) / n^2 * sum over clusters of (sum over the cluster's outcomes of (y_i - y))^2

    This is the cluster-robust variance of a mean (Liang & Zeger 1986; for evaluations of language models
    arXiv:2411.00640, eq. 4) with the usual factor for few clusters. Where no question repeats it is the variance of the
    prompts' means over P. One cluster alone says nothing about the spread: the interval is then the mean +- 1. Where
    every question has the same outcome (all solved, none solved) the interval has no width.
    """
    P, _ = solved_PG.shape
    accuracy = float(solved_PG.mean())
    _, cluster_P = np.unique(np.asarray(questions_P), return_inverse=True)
    deviations_C = np.bincount(cluster_P, weights=solved_PG.mean(1) - accuracy)
    C = len(deviations_C)
    half = Z_95 * math.sqrt(C / (C - 1) * float((deviations_C**2).sum())) / P if C > 1 else 1.0
    return max(0.0, accuracy - half), min(1.0, accuracy + half)


def pass_at_k(solved: int, samples: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples solves it: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374)."""
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def accuracy_metrics(solved_PG: np.ndarray, questions_P: Sequence[str]) -> dict[str, float]:
    """Accuracy, its 95% interval, and pass@k for k = 2, 4, 8, ... up to G.

    ``solved_PG`` is boolean; ``questions_P`` are the rows' questions. With one completion of each question the outcomes
    are independent and the interval is Wilson's. Otherwise it is ``clustered_interval``.
    """
    P, G = solved_PG.shape
    independent = G == 1 and len(set(questions_P)) == P
    low, high = wilson_interval(solved_PG.sum(), P) if independent else clustered_interval(solved_PG, questions_P)
    metrics = {"eval/accuracy": float(solved_PG.mean()), "eval/accuracy_low": low, "eval/accuracy_high": high}
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
    tell: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics and rollout rows of the held-out prompts, equal on every process; each process does its share.

    Draws depend on the seed, prompt and sample but not on the step: two evaluations differ by the weights alone.
    A completion counts as solved where the recipe's evaluation reward is at least 1. Prompts with a completion that
    could not be scored are left out of the accuracy and counted in ``eval/unscored/…``.
    ``tell`` is called with how many prompts have all their completions, counted on this process and taken for as many
    on each.
    """
    evaluation = recipe.evaluation
    sampling = Sampling(
        max_completion_length=evaluation.max_completion_length or recipe.rollout.max_completion_length,
        temperature=evaluation.temperature,
        stop=recipe.rollout.stop,
    )
    check_drawn(((p.id, p.token_ids, p.columns) for p in prompts), "held-out prompts")
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = prompts[rank::world]
    requests = [
        Request(
            p, [key(recipe.training.seed, Stream.EVALUATION.value, p.id, g) for g in range(evaluation.num_generations)]
        )
        for p in mine
    ]
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        tell(min(len(prompts), done * world))

    completions = backend.generate(requests, sampling, version, count)
    groups = [Group(p, c) for p, c in zip(mine, completions, strict=True)]
    scorer.score(groups, version)
    groups = gather_groups({group.prompt.id: group for group in groups})

    name = evaluation.reward or next(iter(groups[0].rewards_by_function))
    # A prompt with an unscored completion says nothing about the model. If all have one, unscored counts as unsolved.
    scored = [group for group in groups if None not in group.rewards_by_function[name]] or groups
    solved_PG = np.array([[r is not None and r >= 1 for r in group.rewards_by_function[name]] for group in scored])
    metrics = accuracy_metrics(solved_PG, [str(group.prompt.prompt) for group in scored])
    metrics |= {f"eval/{k}": v for k, v in completion_metrics(groups).items()}
    for function in groups[0].rewards_by_function:
        values = [r for group in groups for r in group.rewards_by_function[function] if r is not None]
        metrics[f"eval/rewards/{function}/mean"] = float(np.mean(values)) if values else 0.0
        metrics[f"eval/unscored/{function}"] = float(
            sum(r is None for g in groups for r in g.rewards_by_function[function])
        )
    return metrics, rollout_rows(groups, version)


class Evaluated(NamedTuple):
    """An evaluation: its metrics and rows, and the recipe by which it was made, with what ``auto`` stood for."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    recipe: Recipe


def evaluate_recipe(recipe: Recipe, model: str | None = None) -> Evaluated:
    """Evaluate a recipe's model, or another one (a folder or hub id), on its held-out rows: what ``grpo eval`` does."""
    from grpo.backends import check_engine, find_backend, make_backend, resolve_backend
    from grpo.model.policy import Policy
    from grpo.run.session import leave, make_accelerator, prepare_task, resolve_dtype
    from grpo.scoring.scorer import Scorer

    if model is not None:
        recipe = recipe.with_model(model)
    find_backend(recipe.rollout)
    accelerator = make_accelerator(recipe)
    recipe = resolve_backend(resolve_dtype(recipe, accelerator), accelerator)
    check_engine(recipe.rollout)
    tokenizer, stop_ids, task = prepare_task(recipe)
    if not task.eval_prompts:
        raise UserError("data.eval_size is 0: there is nothing to evaluate on")
    with Scorer(recipe.rewards, recipe.scoring) as scorer:
        scorer.check_columns(task.columns)
        policy = Policy(recipe, accelerator, tokenizer, stop_ids, needs_reference=False)
        with closing(make_backend(recipe, policy)) as backend:
            backend.sync(policy, 0)
            metrics, rows = evaluate(recipe, task.eval_prompts, backend, scorer, accelerator, version=0)
    leave(accelerator, policy)
    return Evaluated(metrics, rows, recipe)
