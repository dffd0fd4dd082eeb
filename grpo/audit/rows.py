"""Rows before a run, without tokenizer, weights or network: are they sound, and could a right answer be paid?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from grpo.config import Recipe
from grpo.errors import UserError
from grpo.prompts.task import Part, Task, load_parts, needs_network
from grpo.scoring.functions import row_checks
from grpo.scoring.scorer import Scorer

SHOWN = 5

log = logging.getLogger("grpo")


def check_data(recipe: Recipe, scorer: Scorer | None = None) -> str:
    """Check the rows of a recipe and say in words what is there. Rows of a hub id are left to the run.

    Raises:
        UserError: rows are corrupt or too few, lack a column that a reward of ``scorer`` needs, or hold an answer that
            no completion could match.
    """
    if recipe.data.hub:
        return f": the rows of {recipe.data.hub} are checked when a run loads them"
    if needs_network(recipe):
        return f": the rows of {recipe.data.name} come from the hub and are checked when a run loads them"
    train, held_out, notes = load_parts(recipe)
    if scorer is not None:
        scorer.check_columns(set(train.rows[train.ids[0]]) - {recipe.data.prompt_column})
        if unscorable := unscorable_rows(recipe, [train, held_out]):
            raise UserError("\n".join(unscorable))
    return "; ".join([f": {len(train)} rows to train on, {len(held_out)} held out", *notes])


def unscorable_rows(recipe: Recipe, parts: list[Part]) -> list[str]:
    """For each reward that could pay nobody on some rows: how many, and the first of them by place. Empty if none."""
    messages = []
    for name, check in row_checks(recipe.rewards):
        found = list(_unscorable(check, parts))
        if found:
            shown = [f"  {where}: {why}" for where, why in found[:SHOWN]]
            if len(found) > SHOWN:
                shown.append(f"  and {len(found) - SHOWN} more")
            total = sum(map(len, parts))
            messages.append("\n".join([f"reward {name!r} can score nothing on {len(found)} of {total} rows:", *shown]))
    return messages


def warn_of_unscorable_rows(recipe: Recipe, task: Task) -> None:
    """A run goes on beside such rows: they are unscored, and counted, but who has them should know before it starts."""
    for message in unscorable_rows(recipe, [task.train, task.held_out]):
        log.warning(message)


def _unscorable(check: Callable[[dict[str, Any]], str | None], parts: list[Part]) -> Iterator[tuple[str, str]]:
    for part in parts:
        for row in part.ids:
            if (why := check(part.rows[row])) is not None:
                yield part.rows.place(row), why
