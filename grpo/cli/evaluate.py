"""``grpo eval``: held-out accuracy of a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.arguments import Overrides, Trust, inside, not_empty, read_recipe
from grpo.cli.exit_codes import exit_codes, is_first_of_node
from grpo.cli.terminal import tell
from grpo.config.find import shipped_recipes
from grpo.run.owner import check_own_code

log = logging.getLogger(__name__)


def evaluate(
    recipe_or_run: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_RUN", callback=not_empty, help="A run folder, or a recipe (a file or a name)."
        ),
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", callback=not_empty, help="Model to evaluate. Default: the run's final/, or model.name."
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Evaluate a model on a recipe's held-out tasks, or on a run's.

    A recipe is a program: it can name code. That of a run folder which you have not made here needs --trust.
    """
    run = Path(recipe_or_run).expanduser()
    with exit_codes():
        if run.is_dir():
            if recipe_or_run in shipped_recipes():
                log.info("%s is a folder here, and is taken for a run, not for the recipe of that name", run)
            recipe_or_run = str(inside(run, "recipe.yaml", "is not a run folder"))
            model = model or str(inside(run, "final", "has no final model yet; name another with --model PATH"))
        resolved = read_recipe(recipe_or_run, overrides, trust)
        if run.is_dir() and not trust:
            check_own_code(run, resolved)  # whatever the folder lacks
    with exit_codes(run if run.is_dir() else None):
        from grpo.evaluate import evaluate_recipe

        found = evaluate_recipe(resolved, model)
        if is_first_of_node():
            width = max(map(len, found), default=0)
            for name, value in found.items():
                tell(f"{name:<{width}}  {value:.6g}")
