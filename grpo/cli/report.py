"""``grpo report``: a run folder as pictures and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.arguments import inside, not_empty
from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell


def report(run: Annotated[str, typer.Argument(metavar="RUN", callback=not_empty, help="A run folder.")]) -> None:
    """Draw a run: PNG curves and one self-contained HTML page."""
    with exit_codes():
        folder = Path(run).expanduser()
        inside(folder, "metrics.jsonl", "is not a run folder")
        from grpo.report.write import write_report

        tell(write_report(folder))
