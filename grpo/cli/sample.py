"""``grpo sample``: rejection sampling, from a model to rows to imitate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.arguments import Chunk, OtherModel, Overrides, RecipeArgument, Trust, not_empty, read_recipe, rows_file
from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell


def sample(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Completions a prompt.")] = 16,
    keep: Annotated[
        str,
        typer.Option(
            metavar="RULE[,RULE ...]",
            callback=not_empty,
            help="correct, well_formed, language[=CODE], not_repetitive[=N], pass_rate=LOW..HIGH, REWARD>=X, "
            "distinct[=expressions], shortest=K; each on what the rules before it leave.",
        ),
    ] = "correct",
    output: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Where the rows go.")] = Path("rows.jsonl"),
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Rows to sample for, in the recipe's order. Default: all to train on.")
    ] = None,
    model: OtherModel = None,
    chunk: Chunk = None,
    trust: Trust = False,
) -> None:
    """Sample n completions of each training task, score them, and keep some as rows for stage: sft.

    The rows say which model, seed and recipe they come from. FILE.samples.jsonl has everything that was sampled; the
    same command goes on where a killed one was, and FILE.report.json counts what each rule left.
    """
    with exit_codes():
        from grpo.pipeline.keep import parse_rules

        resolved = read_recipe(recipe, overrides, trust)
        resolved = resolved.with_model(model) if model else resolved
        rules = parse_rules(keep.split(","), resolved)
        output = rows_file(output, [source.rows.path for source in resolved.data.sources()])
        from grpo.pipeline.generate import Wanted
        from grpo.pipeline.sample import lines
        from grpo.pipeline.sample import sample as sample_and_keep

        report = sample_and_keep(resolved, Wanted(n, prompts, chunk=chunk), rules, output)
        for line in lines(report, output) if report else ():
            tell(line)
