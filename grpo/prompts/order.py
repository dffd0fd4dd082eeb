"""Which prompts a step draws: epoch by epoch, or by the pass rates that earlier steps found (the curriculum).

Both orders are functions of the seed, the step and the run's ``Progress``, so a resumed run draws the same prompts.
Epoch by epoch, a step begins where the step before stopped. For that it must know one number: how many prompts the
steps so far drew beyond their ``prompts_per_step``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, cycle
from typing import TYPE_CHECKING

import numpy as np

from grpo.config import PromptsConfig
from grpo.randomness import Stream, key, uniforms
from grpo.types import Group, Prompt

if TYPE_CHECKING:
    from grpo.prompts.task import Task


def prompts_of_step(
    config: PromptsConfig,
    task: Task,
    step: int,
    *,
    extra: int,
    pass_rates: Mapping[int, float],
    ahead: Sequence[int] = (),
) -> Iterator[Prompt]:
    """The prompts of a step, one after the other and without end; the step takes as many as it needs.

    ``extra`` is how many prompts earlier steps drew beyond ``prompts_per_step`` each. ``pass_rates`` are those of the
    rows seen so far, by row id; the curriculum alone uses them. ``ahead`` are rows asked for already, of which the step
    makes use first: the prompts are those behind them, and the curriculum draws such rows last. With `data.mix` the
    position says from which source a prompt comes, and the curriculum which row of it.
    """
    P = task.prompts_per_step
    if config.curriculum:
        taken = set(ahead)
        orders = [
            cycle(sorted(curriculum(config, share.ids, pass_rates, task.seed, step), key=lambda row: row in taken))
            for share in task.train.shares
        ]
        starts = count(step * P + extra + len(ahead), P)
        rows: Iterator[int] = (next(orders[source]) for start in starts for source in task.sources_at(start))
    else:
        rows = (row for start in count(step * P + extra + len(ahead), P) for row in task.rows_at(start))
    return (task.prompt(task.train, row) for row in rows)


def curriculum(
    config: PromptsConfig, ids: Sequence[int], pass_rates: Mapping[int, float], seed: int, step: int
) -> list[int]:
    """All rows in the order in which a step draws them: at random, none twice, in proportion to their weights.

    A row with pass rate p has weight w = floor + (1 - floor) 4 p (1 - p). The term p (1 - p) is the variance of its
    reward, a lower bound of what the policy can gain on it (arXiv:2504.03380); the floor brings every row back. A row
    not yet seen has weight 1, the highest. Rows are sorted by -log(u) / w, with one uniform number u for each row and
    step (Efraimidis & Spirakis 2006).
    """
    rates_N = np.array([pass_rates.get(row, 0.5) for row in ids])
    weights_N = config.curriculum_floor + (1 - config.curriculum_floor) * 4 * rates_N * (1 - rates_N)
    uniforms_N = uniforms([key(seed, Stream.CURRICULUM.value, step)], np.asarray(ids))[0] + 2.0**-33  # never 0
    return [ids[i] for i in np.argsort(-np.log(uniforms_N) / weights_N, kind="stable")]


def updated_pass_rates(
    pass_rates: Mapping[int, float], groups: Sequence[Group], judge: Callable[[str], str], newest: float
) -> dict[int, float]:
    """Pass rates after a step that sampled ``groups``: rate = newest * (the group's) + (1 - newest) * (the one before).

    A group's pass rate is the mean reward that the function of the name ``judge(source)`` gave its scored completions,
    each cut to [0, 1]: for a reward of 0 or 1 it is the share that solved the prompt. A prompt's first visit sets its
    rate. A group without any scored completion changes nothing.
    """
    updated = dict(pass_rates)
    for group in groups:
        given = group.rewards_by_function[judge(group.prompt.source)]
        scored = [min(max(r, 0.0), 1.0) for r in given if r is not None]
        if scored:
            rate = sum(scored) / len(scored)
            before = updated.get(group.prompt.id, rate)
            updated[group.prompt.id] = newest * rate + (1 - newest) * before
    return updated


def curriculum_metrics(pass_rates: Mapping[int, float], rows: int) -> dict[str, float]:
    """How many of the rows were seen, and their mean pass rate."""
    return {
        "curriculum/frac_seen": len(pass_rates) / rows,
        "curriculum/pass_rate": float(np.mean(list(pass_rates.values()))) if pass_rates else 0.0,
    }
