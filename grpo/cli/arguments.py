"""Arguments that several commands share: a recipe, overrides of it, a run folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from grpo.config import Recipe
from grpo.config.find import find_recipe
from grpo.config.load import load_recipe
from grpo.errors import UserError
from grpo.run.owner import check_own_code

RECIPE_HELP = "A file or a name (`grpo recipes` lists the names)."

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as rollout.temperature=0.8.", show_default=False),
]


Trust = Annotated[
    bool, typer.Option("--trust", help="Execute code that a run folder's recipe names, whoever made the folder.")
]


def not_empty(given: str | None) -> str | None:
    """An argument's value. An empty one is a shell variable without a value, and neither the default nor ``.``."""
    if given is not None and not given.strip():
        raise typer.BadParameter("is empty")
    return given


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", callback=not_empty, help=RECIPE_HELP, show_default=False)
]

OtherModel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", callback=not_empty, help="Folder or hub id. Default: the recipe's model.name."),
]
Chunk = Annotated[
    int | None,
    typer.Option(min=1, help="Prompts sampled at once; what a killed process loses. Default: 1024 completions."),
]


def rows_file(output: Path, inputs: Iterable[str | None]) -> Path:
    """Where rows are written. Raises UserError where they can't go there, or would go over what they are made from."""
    output = output.expanduser()
    if output.suffix != ".jsonl" or output.is_dir():
        raise UserError(f"--output {output}: rows go into a file that ends in .jsonl")
    for given in filter(None, inputs):
        if output.exists() and Path(given).expanduser().exists() and output.samefile(Path(given).expanduser()):
            raise UserError(f"--output {output}: is what the rows are read from; give another file")
    return output


def read_recipe(given: str, overrides: list[str] | None, trust: bool) -> Recipe:
    """The recipe of a command. One that lies in a run folder is that run's: its code is executed only if this user has
    made the folder on this machine, or with ``trust``. Raises UserError."""
    file, recipe = find_recipe(given), load_recipe(given, overrides or [])
    file = file.resolve() if file.is_symlink() else file  # a link to a run's recipe is that run's too
    if not trust and file.name.startswith("recipe.") and (file.parent / "environment.json").exists():
        check_own_code(file.parent, recipe)
    return recipe


def inside(run: Path, name: str, complaint: str) -> Path:
    """``run/name``. Raises UserError if ``run`` is no folder, and with ``complaint`` if ``name`` is not in it."""
    from grpo.run.read import no_run, runs_nearby  # here: it imports numpy

    if not run.is_dir():
        raise UserError(no_run(run))
    if not (run / name).exists():
        raise UserError(f"{run}: {complaint} (there is no {name} in it){runs_nearby(run)}")
    return run / name
