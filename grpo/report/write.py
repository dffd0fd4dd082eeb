"""The report of a run, from its folder alone: ``curves.png`` and ``report.html``.

It works on finished, running and killed runs, on other machines, and needs no model. ``grpo/run/read.py`` reads the
folder, ``curves.py`` draws, ``page.py`` writes the page.
"""

from __future__ import annotations

import logging
from pathlib import Path

from grpo.errors import UserError
from grpo.files import write_whole
from grpo.report.page import page
from grpo.run.read import headline, read_run

log = logging.getLogger("grpo")


def write_report(run: Path) -> Path:
    """Draw ``curves.png`` and write ``report.html`` into the run folder; returns the page's path.

    Raises UserError, naming what is missing, where there is nothing to report yet, matplotlib is not installed or the
    folder takes no file.
    """
    try:
        from grpo.report.curves import curves_png, curves_svg  # matplotlib is slow to load
    except ModuleNotFoundError as error:
        raise UserError(
            f"the report needs {error.name}, which is not installed; then run: grpo report {run}"
        ) from error

    record = read_run(run)
    facts = headline(record)
    picture, text = curves_png(record, facts), page(record, facts, curves_svg(record))
    contents: tuple[tuple[str, str | bytes], ...] = (("curves.png", picture), ("report.html", text))
    for name, content in contents:
        try:
            write_whole(run / name, content)
        except OSError as error:
            raise UserError(f"{run / name}: cannot be written: {error.strerror}") from error
    return run / "report.html"


def write_report_at_end(run: Path) -> None:
    """``write_report`` of a run that has reached its end. What the report lacks is a line in the log, and no failure:
    the model is there."""
    try:
        write_report(run)
    except (UserError, OSError) as error:
        log.warning("no report: %s; when that is mended: grpo report %s", error, run)
