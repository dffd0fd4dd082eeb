"""``grpo convert``: a recipe from a configuration of TRL's."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell
from grpo.config.trl.conversion import convert as convert_trl
from grpo.config.trl.write import read_trl, write_recipe
from grpo.errors import UserError


class Stage(str, Enum):
    grpo = "grpo"
    sft = "sft"


def convert(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="YAML of `trl grpo --config`, or a GRPOConfig or SFTConfig as JSON."),
    ],
    num_processes: Annotated[
        int | None, typer.Option("--num-processes", min=1, help="Processes that TRL's run had. Default: 1.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Rows trained on; the length of an epoch follows.")
    ] = None,
    stage: Annotated[
        Stage | None, typer.Option("--stage", help="Which trainer the file is for. Default: found out by its keys.")
    ] = None,
) -> None:
    """Print a recipe that does what a configuration of TRL's says: `grpo convert trl.yaml > recipe.yaml`."""
    with exit_codes():
        file = file.expanduser()
        given = read_trl(file)
        try:
            wanted: Any = stage.value if stage else None
            found = convert_trl(given, stage=wanted, num_processes=num_processes, rows=rows)
        except UserError as error:
            raise UserError("\n".join(f"{file}: {line}" for line in str(error).split("\n"))) from None
        text = write_recipe(found, file.name)
    tell(text, nl=False)
    for place, what in found.to_fill:
        tell(f"{file}: fill in {place}: {what}", err=True)
    if found.left:
        names = ", ".join(dict.fromkeys(key for key, _ in found.left))
        tell(f"{file}: no place here for {names}; the recipe's header says why", err=True)
