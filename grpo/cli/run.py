"""``grpo run``: a chain of stages, each a recipe; and the process in which one of its models is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.arguments import not_empty
from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell


def run(
    chain: Annotated[
        str, typer.Argument(metavar="CHAIN", callback=not_empty, help="A file, or the name of one that grpo ships.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides of the chain: output_dir=runs/x, seed=1, stages.rl.n=8, "
            "stages.rl.overrides.training.max_steps=50.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every stage, say what would run and why, and run nothing.")
    ] = False,
) -> None:
    """Run a chain of stages: sft, grpo, distill, sample, filter, eval. Killed anywhere, the same command goes on.

    A stage runs again where something that it is made from has changed, and so do those that depend on it.
    """
    with exit_codes():
        from grpo.pipeline.chain import dry_run as what_would_run
        from grpo.pipeline.chain import run_chain
        from grpo.pipeline.chain_file import load_chain
        from grpo.pipeline.summary import lines

        plan = load_chain(chain, overrides or [])
        if dry_run:
            for line in what_would_run(plan):
                tell(line)
            return
        summary = run_chain(plan)
        for line in lines(summary):
            tell(line)
        tell(f"{plan.folder / 'summary.json'}, {plan.folder / 'report.html'}")


def measure(request: Annotated[Path, typer.Argument(metavar="FILE.json")]) -> None:
    """Measure a chain's model, as the chain asks for in a file."""
    with exit_codes():
        from grpo.pipeline.measure import measure as measure_model

        measure_model(request)
