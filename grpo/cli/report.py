"""``grpo report``, ``grpo watch`` and ``grpo compare``: run folders for people. They execute nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.arguments import inside, not_empty
from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell
from grpo.errors import UserError

RunArgument = Annotated[str, typer.Argument(metavar="RUN", callback=not_empty, help="A run folder.")]


def report(run: RunArgument) -> None:
    """Draw a run: PNG curves and one self-contained HTML page."""
    with exit_codes():
        folder = Path(run).expanduser()
        inside(folder, "metrics.jsonl", "is not a run folder")
        from grpo.report.write import write_report
        from grpo.run.folder import is_running

        tell(write_report(folder, running=is_running(folder)))


def watch(
    run: RunArgument,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
) -> None:
    """Show a run's curves and newest completions in a terminal until it ends."""
    with exit_codes(), contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how one stops looking
        from grpo.report.watch import watch as show

        show(Path(run).expanduser(), once=once)


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN ...", help="Run folders; or evaluations, NAME.json, or folders of them."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page.")] = Path("compare.html"),
) -> None:
    """Compare runs: means over seeds, curves, a paired test on the same held-out prompts and on the suites of both; a
    table and a page. Or compare evaluations: the paired test of two models on the same suites."""
    with exit_codes():
        from grpo.report.compare_page import write_comparison
        from grpo.report.compare_suites import is_evaluation, write_evaluations

        given = [run.expanduser() for run in runs]
        kinds = [is_evaluation(path) for path in given]
        if any(kinds) and not all(kinds):
            mixed = given[kinds.index(False)]
            raise UserError(
                f"{mixed} is a run folder, and others are evaluations: give one kind ({mixed}/eval has its own)"
            )
        write = write_evaluations if all(kinds) else write_comparison
        for line in write(given, out.expanduser()):
            tell(line)
