"""Checks of rows before a run, without tokenizer, weights or network: are they sound, and could an answer be paid?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from grpo.config import Recipe, RewardConfig
from grpo.errors import UserError
from grpo.prompts.rows import Part, load_parts, needs_network
from grpo.prompts.task import Task
from grpo.scoring.functions import row_checks
from grpo.scoring.scorer import Scorer

SHOWN = 5  # rows of a reward that a message spells out

log = logging.getLogger("grpo")


def check_data(recipe: Recipe, scorer: Scorer | None = None, *, with_notes: bool = True) -> str:
    """Check the rows of a recipe; returns in words what there is, and ``with_notes`` what of it is unexpected. Rows of
    a hub id are left to the run.

    Raises:
        UserError: rows are corrupt or too few, lack a column that a reward of ``scorer`` needs, or hold an answer that
            no completion could match.
    """
    if recipe.data.hub:
        return f": the rows of {recipe.data.hub} are checked when a run loads them"
    if needs_network(recipe.data, recipe.training.seed):
        return f": the rows of {recipe.data.name} come from the hub and are checked when a run loads them"
    train, held_out, notes = load_parts(recipe.data, recipe.training, recipe.stage)
    if scorer is not None:
        scorer.check_columns(set(train.rows[train.ids[0]]) - {recipe.data.prompt_column})
        if unscorable := unscorable_rows(recipe.rewards, [train, held_out]):
            raise UserError("\n".join(unscorable))
    found = f": {len(train)} rows to train on, {len(held_out)} held out"
    return "; ".join([found, *notes]) if with_notes else found


def unscorable_rows(rewards: Sequence[RewardConfig], parts: list[Part]) -> list[str]:
    """A message for each reward that can score nothing on some rows: how many rows, and the places of the first."""
    messages = []
    for name, check in row_checks(rewards):
        found = list(_unscorable(check, parts))
        if found:
            shown = [f"  {where}: {why}" for where, why in found[:SHOWN]]
            if len(found) > SHOWN:
                shown.append(f"  and {len(found) - SHOWN} more")
            total = sum(map(len, parts))
            messages.append("\n".join([f"reward {name!r} can score nothing on {len(found)} of {total} rows:", *shown]))
    return messages


def warn_of_unscorable_rows(rewards: Sequence[RewardConfig], task: Task) -> None:
    """Log the messages of ``unscorable_rows``. A run goes on with such rows; their completions count as unscored."""
    for message in unscorable_rows(rewards, [task.train, task.held_out]):
        log.warning(message)


def _unscorable(check: Callable[[dict[str, Any]], str | None], parts: list[Part]) -> Iterator[tuple[str, str]]:
    for part in parts:
        for row in part.ids:
            if (why := check(part.rows[row])) is not None:
                yield part.rows.place(row), why
