"""Checks of rows before a run, without tokenizer, weights or network: are they sound, and could an answer be paid?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.config import Recipe, RewardConfig
from grpo.errors import UserError
from grpo.prompts.overlap import find_overlaps, question_text
from grpo.prompts.parts import Part
from grpo.prompts.rows import load_parts, needs_network
from grpo.prompts.task import Task
from grpo.scoring.functions import row_checks
from grpo.scoring.scorer import Scorer

SHOWN = 5  # rows of a reward that a message spells out

log = logging.getLogger("grpo")


@dataclass(frozen=True)
class Unscorable:
    """The rows on which a reward can score nothing: their places and why, of ``total``."""

    reward: str
    rows: list[tuple[str, str]]
    total: int

    @property
    def share(self) -> float:
        return len(self.rows) / self.total

    def message(self) -> str:
        shown = [f"  {where}: {why}" for where, why in self.rows[:SHOWN]]
        if len(self.rows) > SHOWN:
            shown.append(f"  and {len(self.rows) - SHOWN} more (grpo validate --rows lists all)")
        return "\n".join(
            [f"reward {self.reward!r} can score nothing on {len(self.rows)} of {self.total} rows:", *shown]
        )


def check_data(
    recipe: Recipe, scorer: Scorer | None = None, *, with_notes: bool = True, unscorable: list[Unscorable] | None = None
) -> str:
    """Check the rows of a recipe; returns in words what there is, and ``with_notes`` what of it is unexpected. Rows of
    a hub id are left to the run. The list ``unscorable`` gets the rows on which a reward of ``scorer`` can score
    nothing.

    Raises:
        UserError: rows are corrupt or too few, lack a column that a reward of ``scorer`` needs, or more of them than
            ``scoring.max_unscorable_rows`` hold an answer that no completion could match.
    """
    for source in recipe.data.sources():
        if source.rows.hub:
            return f": the rows of {source.rows.hub} are checked when a run loads them"
        if needs_network(source, recipe.training.seed):
            return f": the rows of {source.rows.name} come from the hub and are checked when a run loads them"
    train, held_out, notes = load_parts(
        recipe.data, recipe.training, recipe.stage, environment=recipe.environment is not None
    )
    there_is = f": {len(train)} rows to train on, {len(held_out)} held out"
    if scorer is not None:
        scorer.check_columns(
            {share.source: share.row(share.ids[0]).keys() - {share.data.prompt_column} for share in train.shares}
        )
        found = unscorable_rows(recipe.functions(), [train, held_out])
        if unscorable is not None:
            unscorable += found
        refuse_unscorable(recipe, found)
        for one in found:
            there_is += f"; {one.reward} can score nothing on {len(one.rows)} of them (--rows lists these)"
    if recipe.environment is None and (note := overlap_note(train, held_out)):
        there_is += f"; {note}"
    return "; ".join([there_is, *notes]) if with_notes else there_is


def unscorable_rows(rewards: Sequence[RewardConfig], parts: list[Part]) -> list[Unscorable]:
    """What each reward can score nothing on, if there is such a row."""
    found = []
    for reward, check in row_checks(rewards):
        shares = [share for part in parts for share in part.shares if reward.scores(share.source)]
        checked = ((share.place(row), check(share.row(row))) for share in shares for row in share.ids)
        if rows := [(where, why) for where, why in checked if why is not None]:
            found.append(Unscorable(str(reward.name), rows, sum(map(len, shares))))
    return found


def refuse_unscorable(recipe: Recipe, found: Sequence[Unscorable]) -> None:
    """Raise UserError where they are a larger share of the rows than the recipe allows."""
    most = recipe.scoring.max_unscorable_rows
    if too_many := [one.message() for one in found if one.share > most]:
        cure = f"that is more than scoring.max_unscorable_rows: {most:g} allows; mend the rows or leave them out"
        raise UserError("\n".join([*too_many, cure]))


LEAST_ROWS = 50  # to train on, before their templates are known


def overlap_note(train: Part, held_out: Part) -> str:
    """A sentence where rows to train on repeat held-out questions in other words than the very same, which are left out
    anyway; empty where none does."""
    rows, questions = _asked(train), _asked(held_out)
    found = find_overlaps([text for _, text in rows], [text for _, text in questions]).found
    found = [one for one in found if one.how == "exact" or len(train) >= LEAST_ROWS]
    if not found:
        return ""
    first = max(found, key=lambda one: (one.covers, -one.row))
    return (
        f"{len(found)} of the {len(train)} rows to train on repeat held-out questions: {rows[first.row][0]} and "
        f"{questions[first.question][0]} share {first.shared!r} ({first.how}). What is measured on those is memory; "
        "grpo data decontaminate ROWS --against EVALUATION writes the rows without them"
    )


def warn_of_overlap(task: Task) -> None:
    """Log what ``overlap_note`` says. A run goes on all the same."""
    if note := overlap_note(task.train, task.held_out):
        log.warning("data: %s", note)


def _asked(part: Part) -> list[tuple[str, str]]:
    """The place and the text of every question."""
    return [
        (share.place(row), question_text(question))
        for share in part.shares
        for row, question in share.values(share.data.prompt_column).items()
    ]


def check_rows_at_start(recipe: Recipe, task: Task, *, resuming: bool = False) -> None:
    """Log what rewards can score nothing on, and rows that repeat held-out questions. A run goes on with such rows;
    completions that can't be scored count as unscored.

    Raises:
        UserError: they are more than ``scoring.max_unscorable_rows``. A run that resumes has begun with them.
    """
    found = unscorable_rows(recipe.functions(), [task.train, task.held_out])
    if not resuming:
        refuse_unscorable(recipe, found)
    for one in found:
        log.warning(one.message())
    if not resuming and recipe.environment is None:  # whose rows may all ask the same
        warn_of_overlap(task)
