"""Held-out rows, sampled and scored; the same code before, during and after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo.backends.base import Backend, Request, Sampling
from grpo.config import Recipe
from grpo.environments.episodes import Episodes, play
from grpo.evaluation.statistics import accuracy_metrics
from grpo.metrics import completion_metrics, episode_metrics, rollout_rows
from grpo.randomness import Stream, key
from grpo.run.agreement import check_drawn
from grpo.run.exchange import gather_groups
from grpo.types import Group, Prompt

if TYPE_CHECKING:
    from accelerate import Accelerator

    from grpo.scoring.scorer import Scorer


def evaluate(
    recipe: Recipe,
    prompts: list[Prompt],
    backend: Backend,
    scorer: Scorer,
    accelerator: Accelerator,
    *,
    version: int,
    episodes: Episodes | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics and rollout rows of the held-out prompts, equal on every process; each process does its share.

    Draws depend on the seed, prompt and sample but not on the step: two evaluations differ by the weights alone.
    ``tell`` is called with how many prompts have all their completions, counted on this process and taken for as many
    on each.
    """
    groups = sample_and_score(
        recipe, prompts, backend, scorer, accelerator, version=version, episodes=episodes, tell=tell
    )
    metrics = held_out_metrics(recipe, groups) | metrics_by_source(recipe, groups)
    if episodes is not None:
        metrics |= {
            f"eval/{name}": value for name, value in episode_metrics(groups, tools=bool(episodes.tools)).items()
        }
    return metrics, [row | judged_by(recipe, row) for row in rollout_rows(groups, version)]


def sample_and_score(
    recipe: Recipe,
    prompts: list[Prompt],
    backend: Backend,
    scorer: Scorer,
    accelerator: Accelerator,
    *,
    version: int,
    episodes: Episodes | None = None,
    tell: Callable[[int], None] = lambda done: None,
    draws: tuple[str, ...] = (),
) -> list[Group]:
    """The prompts' completions by the recipe's ``evaluation``, with their rewards, on every process. With ``episodes``
    the recipe's environment answers. ``draws`` sets the draws apart from those of other prompts with the same numbers.
    """
    evaluation = recipe.evaluation
    sampling = Sampling(
        max_completion_length=evaluation.max_completion_length or recipe.rollout.max_completion_length,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        stop=recipe.rollout.stop,
    )
    check_drawn(((p.id, p.token_ids, p.columns) for p in prompts), "held-out prompts")
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = prompts[rank::world]
    seed = recipe.training.seed
    requests = [
        Request(p, [key(seed, Stream.EVALUATION.value, *draws, p.id, g) for g in range(evaluation.num_generations)])
        for p in mine
    ]
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        tell(min(len(prompts), done * world))

    groups = play(episodes, backend, requests, sampling, version, count)
    scorer.score(groups, version)
    return gather_groups({group.prompt.id: group for group in groups})


def judged_groups(recipe: Recipe, groups: list[Group]) -> tuple[list[Group], np.ndarray]:
    """The groups that say something of the model, and which of their completions count as solved (P,G): those to which
    the reward that judges their source gives at least 1.

    A prompt with a completion that could not be scored says nothing. If all have one, unscored counts as unsolved.
    """

    def judged(group: Group) -> list[float | None]:
        return group.rewards_by_function[recipe.judged_by(group.prompt.source)]

    scored = [group for group in groups if None not in judged(group)] or groups
    return scored, np.array([[r is not None and r >= 1 for r in judged(group)] for group in scored])


def question(group: Group) -> str:
    """What a group was asked; as ``metrics.question_of`` for its rows."""
    asked, played = str(group.prompt.prompt), any(c.episode is not None for c in group.completions)
    return f"{asked} #{group.prompt.id}" if played else asked


def held_out_metrics(recipe: Recipe, groups: list[Group]) -> dict[str, float]:
    """Accuracy over the prompts that could be scored; lengths and what each reward gave over all. The others are
    counted in ``eval/unscored/…``."""
    if not recipe.functions():  # distilled without any: there are lengths alone to tell
        return {f"eval/{name}": value for name, value in completion_metrics(groups).items()}
    scored, solved_PG = judged_groups(recipe, groups)
    metrics = accuracy_metrics(solved_PG, [question(group) for group in scored])
    metrics |= {f"eval/{k}": v for k, v in completion_metrics(groups).items()}
    for function, reward in zip(recipe.reward_names(), recipe.functions(), strict=True):
        values = [r for g in groups if reward.scores(g.prompt.source) for r in g.rewards_by_function[function]]
        given = [r for r in values if r is not None]
        metrics[f"eval/rewards/{function}/mean"] = float(np.mean(given)) if given else 0.0
        metrics[f"eval/unscored/{function}"] = float(values.count(None))
    return metrics


def metrics_by_source(recipe: Recipe, groups: list[Group]) -> dict[str, float]:
    """The same of each source of `data.mix`, as ``eval/sources/LABEL/…``, without the rewards' parts."""
    metrics: dict[str, float] = {}
    for label in (source.label for source in recipe.data.sources() if source.label):
        of_source = [group for group in groups if group.prompt.source == label]
        found = held_out_metrics(recipe, of_source) if of_source else {}
        told = {k.removeprefix("eval/"): v for k, v in found.items() if not k.startswith(("eval/rew", "eval/unsc"))}
        metrics |= {f"eval/sources/{label}/{name}": value for name, value in told.items()}
    return metrics


def judged_by(recipe: Recipe, row: dict[str, Any]) -> dict[str, str]:
    """Which reward judges a row of a source of `data.mix`."""
    return {"judged_by": recipe.judged_by(row["source"])} if "source" in row else {}
