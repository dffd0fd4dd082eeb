"""``grpo teach``: what a teacher says of a recipe's rows, as rows to distill from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.arguments import Overrides, RecipeArgument, Trust, read_recipe
from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell

TOP_K = 32


def teach(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FOLDER", help="Where rows go. Default: training.output_dir with _taught behind it."
        ),
    ] = None,
    top_k: Annotated[
        int, typer.Option("--top-k", min=1, help="Likeliest tokens to keep at each token of a completion.")
    ] = TOP_K,
    column: Annotated[str, typer.Option("--column", metavar="NAME", help="The column to write.")] = "teacher",
    trust: Trust = False,
) -> None:
    """Write the rows of RECIPE (stage sft, with teacher.name) with the teacher's likeliest tokens and their
    log-probabilities at each token, for a run with teacher.column.

    Started again, it goes on where it was killed.
    """
    with exit_codes():
        resolved = read_recipe(recipe, overrides, trust)
        from grpo.pipeline.teach import teach as write
        from grpo.run.screen import working

        folder = output.expanduser() if output else Path(f"{resolved.training.output_dir}_taught")
        with working(f"asking {resolved.teacher.name if resolved.teacher else 'nobody'}", shown=True):
            written = write(resolved, folder, top_k, column=column)
        for name, file in written.files.items():
            tell(f"{file}: {written.rows[name]} rows")
        tell(f"the {top_k} likeliest tokens cover {written.covered:.4f} of the probability in the first row")
        train, held_out = written.files["train"], written.files.get("eval")
        data = {"path": str(train)} | ({"eval_path": str(held_out)} if held_out else {"eval_size": 0})
        shown = ", ".join(f"{key}: {value}" for key, value in data.items())
        tell(f"distill from them with  data: {{{shown}}}  teacher: {{column: {column}}}")
