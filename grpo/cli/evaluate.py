"""``grpo eval``: held-out accuracy of a model."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.arguments import Overrides, Trust, inside, not_empty, read_recipe
from grpo.cli.exit_codes import exit_codes, is_first_of_node
from grpo.cli.terminal import tell
from grpo.config.find import shipped_recipes
from grpo.errors import UserError
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
            metavar="MODEL",
            callback=not_empty,
            help="Folder or hub id to evaluate. Default: the run's final/, or model.name.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where NAME.json and NAME.jsonl go. Default: eval/ of the run, if any."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the files are called. Default: as the model is.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Evaluate a model on a recipe's held-out tasks, or on a run's.

    Counts, interval, settings and versions go into eval/NAME.json, every completion into eval/NAME.jsonl.
    A recipe is a program: it can name code. That of a run folder which you have not made here needs --trust.
    """
    run = Path(recipe_or_run).expanduser()
    with exit_codes():
        from grpo.run.read import no_run, runs_nearby

        if run.is_dir():
            if recipe_or_run in shipped_recipes():
                log.info("%s is a folder here, and is taken for a run, not for the recipe of that name", run)
            recipe_or_run = str(inside(run, "recipe.yaml", "is not a run folder"))
            model = model or str(inside(run, "final", "has no final model yet; name another with --model PATH"))
        try:
            resolved = read_recipe(recipe_or_run, overrides, trust)
        except UserError:
            if not run.exists() and runs_nearby(run.parent):  # a run that is not there, and no recipe
                raise UserError(no_run(run)) from None
            raise
        if run.is_dir() and not trust:
            check_own_code(run, resolved)  # whatever the folder lacks
    with exit_codes(run if run.is_dir() else None):
        from grpo.evaluate import evaluate_recipe

        found = evaluate_recipe(resolved, model)
        if is_first_of_node():
            width = max(map(len, found.metrics), default=0)
            for metric, value in found.metrics.items():
                tell(f"{metric:<{width}}  {value:.6g}")
            folder = output.expanduser() if output else run / "eval" if run.is_dir() else None
            if folder and os.environ.get("RANK", "0") == "0":
                from grpo.run.evaluations import write_evaluation

                written = write_evaluation(
                    folder, name, found.recipe, model or resolved.model.name, found.metrics, found.rows
                )
                tell(f"{written} and its samples, {written.with_suffix('.jsonl').name}", err=True)
            elif folder is None:
                tell("nothing is written without a run folder; --output FOLDER keeps numbers and samples", err=True)
