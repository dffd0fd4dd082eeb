"""``grpo data``: rows before they are trained on. Each command writes rows, and says why others are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.arguments import Chunk, OtherModel, Overrides, RecipeArgument, Trust, not_empty, read_recipe, rows_file
from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell
from grpo.errors import UserError

app = typer.Typer(
    help="Rows to train on: leave out what repeats an evaluation, what is too easy or too hard, doubles.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("decontaminate")
def decontaminate(
    rows: Annotated[str, typer.Argument(metavar="ROWS", callback=not_empty, help="A .jsonl, .parquet or .csv file.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="EVALUATION", help="Further ones, as --against.", show_default=False),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="EVALUATION",
            help="A file of questions, a suite, or a recipe (its held-out rows). Repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Where the rows go. Default: ROWS.clean.jsonl.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", callback=not_empty, help="Column of the questions in ROWS. Default: prompt, …"),
    ] = None,
) -> None:
    """Write rows without those that repeat questions of an evaluation.

    Repeats are the same words, 13 words in a row, 8 in a row that cover half of a question, or the same words moved
    with one changed; templates that many rows share are none. FILE.dropped.jsonl has the proof of each row.
    """
    with exit_codes():
        names = [*(against or []), *(more or [])]
        if not names:
            raise UserError("--against EVALUATION: name at least one file of questions, suite or recipe")
        target = rows_file(output or Path(rows).with_suffix(".clean.jsonl"), [rows, *names])
        from grpo.pipeline import decontaminate as room

        report = room.decontaminate(rows, names, target, column)
        for line in room.lines(report, target):
            tell(line)


@app.command("filter")
def filter_rows(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    pass_rate: Annotated[
        str | None,
        typer.Option(
            "--pass-rate",
            metavar="LOW..HIGH",
            callback=not_empty,
            help="Keep rows whose pass rate is within, such as 0.1..0.9. Default: nothing is sampled.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Completions a row, by which its pass rate is measured.")] = 8,
    output: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Where the rows go.")] = Path("filtered.jsonl"),
    model: OtherModel = None,
    chunk: Chunk = None,
    trust: Trust = False,
) -> None:
    """Keep a recipe's training rows that a model solves sometimes, and that are sound and no doubles.

    Left out are rows that are too long, whose answer no reward can read, that repeat an earlier row, and whose pass
    rate is outside of the window. The same command goes on where a killed one was; FILE.dropped.jsonl says why.
    """
    with exit_codes():
        from grpo.pipeline.keep import window

        resolved = read_recipe(recipe, overrides, trust)
        resolved = resolved.with_model(model) if model else resolved
        output = rows_file(output, [source.rows.path for source in resolved.data.sources()])
        from grpo.pipeline import filter as room

        wanted = None
        if pass_rate is not None:
            try:
                wanted = room.Window(*window(pass_rate), n, chunk)
            except ValueError as error:
                raise UserError(f"--pass-rate: {error}") from None
        room.check_filter(resolved, wanted)
        report = room.filter_rows(resolved, wanted, output)
        for line in room.lines(report, output) if report else ():
            tell(line)
