"""Arguments that several commands share: a recipe, overrides of it, a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo.errors import UserError

RECIPE_HELP = "A file or a name (`grpo recipes` lists the names)."

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help=RECIPE_HELP, show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as rollout.temperature=0.8.", show_default=False),
]


def inside(run: Path, name: str, complaint: str) -> Path:
    """``run/name``. Raises UserError if ``run`` is no folder, and with ``complaint`` if ``name`` is not in it."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    if not (run / name).exists():
        raise UserError(f"{run}: {complaint} (there is no {name} in it)")
    return run / name
