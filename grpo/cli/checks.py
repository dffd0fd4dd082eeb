"""``grpo validate`` and ``grpo audit``: what can be checked of a recipe, its rows and its rewards before a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from grpo.cli.arguments import Overrides, RecipeArgument, Trust, not_empty, read_recipe
from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell
from grpo.config.load import as_overrides
from grpo.errors import RunError, UserError

if TYPE_CHECKING:
    from grpo.audit.rows import Unscorable
    from grpo.config import Recipe


def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|KEY=VALUE",
            help="Recipes (files or names), then overrides for them all.",
        ),
    ],
    rows: Annotated[
        bool, typer.Option("--rows", help="List every row that a reward can score nothing on, and why.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Check recipes and their data, without weights or network.

    One line for each recipe that is right; all mistakes at the end.
    """
    files = [a for a in recipes if "=" not in a or os.path.exists(a)]  # which says no to a word too long for a path
    overrides = [a for a in recipes if a not in files]
    failures = []
    with exit_codes():
        if written := as_overrides([a for a in recipes if not os.path.exists(a)]):
            raise UserError("\n".join(written))
        if not files:
            raise UserError(f"no recipe given, only overrides: {' '.join(overrides)}")
        for file in files:
            try:
                resolved = read_recipe(file, overrides, trust)
            except UserError as error:
                failures.append(str(error))
                continue
            unscorable: list[Unscorable] = []
            try:
                tell(f"OK {file}{check_offline(resolved, unscorable)}")
            except UserError as error:
                failures += [f"{file}: {line}" for line in str(error).splitlines()]
            if rows:
                _list_rows(unscorable)
        if failures:
            raise UserError("\n".join(failures))


def audit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to try, of those to train on and held out.")] = 200,
    gold: Annotated[
        str | None,
        typer.Option(
            "--gold",
            metavar="TEMPLATE",
            callback=not_empty,
            help="A right completion, for rewards of yours: '#### {answer}'.",
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Try a recipe's rewards on its rows: right answers and cheats.

    Right answers must be paid, cheats must not.
    """
    with exit_codes():
        resolved = read_recipe(recipe, overrides, trust)
        if not any(source.rows.hub for source in resolved.data.sources()):
            os.environ["HF_HUB_OFFLINE"] = "1"  # a tokenizer is used if it is on this machine, and not downloaded
        from grpo.audit.audit import audit as audit_rewards

        findings = audit_rewards(resolved, rows, gold, tell)
        if findings:
            raise RunError("\n".join([f"{recipe}: the rewards are not sound:", *(f"  {found}" for found in findings)]))
        tell(f"OK {recipe}: nothing was found")


def _list_rows(unscorable: list[Unscorable]) -> None:
    """A line for each row that nobody could be right on: place, reward, why."""
    for one in unscorable:
        for where, why in one.rows:
            tell(f"{where}: {one.reward}: {why}")


def check_offline(recipe: Recipe, unscorable: list[Unscorable] | None = None) -> str:
    """Check reward functions, rows and prompts with what is on this machine.

    Returns a note on what there is and what remains to be checked. The list ``unscorable`` gets the rows that a reward
    can score nothing on. Raises UserError with all problems found.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers and datasets are imported, which is below
    from grpo.audit.rows import check_data
    from grpo.backends import find_backend
    from grpo.environments.episodes import check_environment
    from grpo.environments.prepared import prepared
    from grpo.losses import find_loss
    from grpo.scoring.scorer import Scorer

    note, problems, scorer = "", [], None
    for find in (
        lambda: find_loss(recipe.algorithm.loss_type),
        lambda: find_backend(recipe),
        lambda: check_environment(recipe),
    ):
        try:
            find()
        except UserError as error:
            problems.append(str(error))
    try:
        scorer = Scorer(recipe.functions(), recipe.scoring.model_copy(update={"workers": 1}))
    except UserError as error:
        problems.append(str(error))
    try:
        has_tokenizer = _has_tokenizer(recipe)  # with one, prepared says what is unexpected
        note = check_data(recipe, scorer, with_notes=not has_tokenizer, unscorable=unscorable)
        if not has_tokenizer:
            source = recipe.model.tokenizer or recipe.model.name
            note += f"; prompts are checked when the run starts (no tokenizer of {source} on this machine)"
        elif not any(source.rows.hub for source in recipe.data.sources()):
            with prepared(recipe):
                pass
    except UserError as error:
        problems += [str(error)] if str(error) not in problems else []  # prepared looks at the environment again
    finally:
        if scorer is not None:
            scorer.close()
    if problems:
        raise UserError("\n".join(problems))
    return note + _engine_note(recipe)


def _engine_note(recipe: Recipe) -> str:
    """A recipe may be checked on a machine that does not train it, so a missing engine is no mistake."""
    from grpo.backends import check_engine

    try:
        check_engine(recipe.rollout)
    except UserError as error:
        return f"; {error}"
    return ""


def _has_tokenizer(recipe: Recipe) -> bool:
    """Whether the tokenizer is on this machine. Raises UserError where it never will be: a folder that is not there."""
    from grpo.model.loading import load_configs, load_tokenizer, still_to_come

    try:
        load_tokenizer(recipe.model)
        load_configs(recipe.model)
    except UserError:
        if still_to_come(recipe.model.tokenizer or recipe.model.name) or still_to_come(recipe.model.name):
            return False
        raise
    return True
