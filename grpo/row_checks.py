"""Rows before a run, without tokenizer, weights or network: are they sound, and could a right answer be paid?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from grpo.config import Recipe
from grpo.errors import UserError
from grpo.scoring import Scorer
from grpo.scoring_functions import row_checks
from grpo.tasks import Part, load_parts, needs_network

SHOWN = 5


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
        for name, check in row_checks(recipe.rewards):
            _refuse_unscorable(name, check, [train, held_out])
    return "; ".join([f": {len(train)} rows to train on, {len(held_out)} held out", *notes])


def _refuse_unscorable(name: str, check: Callable[[dict[str, Any]], str | None], parts: list[Part]) -> None:
    """Raise with the first rows on which this reward could pay nobody, and the number of the rest."""
    found = list(_unscorable(check, parts))
    if found:
        shown = [f"  {where}: {why}" for where, why in found[:SHOWN]]
        if len(found) > SHOWN:
            shown.append(f"  and {len(found) - SHOWN} more")
        total = sum(map(len, parts))
        raise UserError("\n".join([f"reward {name!r} can score nothing on {len(found)} of {total} rows:", *shown]))


def _unscorable(check: Callable[[dict[str, Any]], str | None], parts: list[Part]) -> Iterator[tuple[str, str]]:
    for part in parts:
        for row in part.ids:
            if (why := check(part.rows[row])) is not None:
                yield part.rows.place(row), why
