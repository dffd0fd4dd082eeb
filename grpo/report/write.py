"""The report of a run, from its folder alone: ``curves.png`` and ``report.html``; and what a command says at its end.

It works on finished, running and killed runs, on other machines, and needs no model. ``grpo/run/read.py`` reads the
folder, ``curves.py`` draws, ``page.py`` writes the page.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

from grpo.errors import UserError
from grpo.files import write_whole
from grpo.report.page import REFRESH, page
from grpo.run.fields import COST, dollars, duration
from grpo.run.read import RunRecord, headline, read_run
from grpo.run.screen import say

log = logging.getLogger("grpo")


def write_report(run: Path, *, running: bool = False) -> Path:
    """Draw ``curves.png`` and write ``report.html`` into the run folder; returns the page's path. The page of a
    ``running`` run loads itself again every now and then.

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
    picture, text = curves_png(record, facts), page(record, facts, curves_svg(record), running=running)
    contents: tuple[tuple[str, str | bytes], ...] = (("curves.png", picture), ("report.html", text))
    for name, content in contents:
        try:
            write_whole(run / name, content)
        except OSError as error:
            raise UserError(f"{run / name}: cannot be written: {error.strerror}") from error
    return run / "report.html"


def no_longer_running(run: Path) -> None:
    """Let the page that was written during the run be, and not load itself again."""
    with contextlib.suppress(FileNotFoundError):
        text = (run / "report.html").read_text(encoding="utf-8", errors="surrogateescape")
        if REFRESH in text:
            write_whole(run / "report.html", text.replace(REFRESH, "", 1))


def write_report_at_end(run: Path) -> None:
    """``write_report`` of a run that has reached its end, and where everything is. What the report lacks is a line in
    the log, and no failure: the model is there."""
    try:
        write_report(run)
    except (UserError, OSError) as error:
        log.warning("no report: %s; when that is mended: grpo report %s", error, run)
    for line in ending(run):
        say(line)


def ending(folder: Path) -> Iterator[str]:
    """What a run has achieved and cost, where report and model are, and what to do next; a line each."""
    run = read_run(folder)
    yield f"done: {folder}"
    result = ", ".join([f"{run.steps} steps", *_achieved(run)])
    yield from textwrap.wrap(result, 80, initial_indent="  result  ", subsequent_indent=" " * 10)
    report, final, name = folder / "report.html", folder / "final", shlex.quote(str(folder))
    if report.exists():
        yield f"  report  {report}"
    if final.exists():
        yield f"  model   {final}"
    if (best := folder / "best").exists():
        yield f"  best    {best}, by {run.setting('training.save_best', 'an evaluation')}"
    if run.setting("stage") == "sft":
        yield f"  next    grpo train RECIPE model.name={shlex.quote(str(final))}"
    else:
        yield f"  next    grpo eval {name}"
        yield f"          grpo chat {name}"


def _achieved(run: RunRecord) -> Iterator[str]:
    facts = headline(run)
    if "accuracy_after" in facts:
        yield f"held-out accuracy {facts['accuracy_before']:.3f} -> {facts['accuracy_after']:.3f}"
    elif "loss_after" in facts and run.setting("stage") == "sft":
        yield f"loss {facts['loss_before']:.3f} -> {facts['loss_after']:.3f}"
    if "seconds" in facts:
        yield f"{duration(facts['seconds'])} in steps"
    if COST in facts:
        share = facts.get("cost_usd", 0.0) / facts[COST] if facts[COST] else 0.0
        yield dollars(facts[COST]) + (f" ({share:.0%} in steps)" if share else "")
