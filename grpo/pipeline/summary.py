"""What a chain has come to: ``summary.json``, lines for a terminal, and ``report.html``. Nothing of torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.files import write_whole
from grpo.pipeline.chain_file import START, Plan, Stage
from grpo.pipeline.stage import State
from grpo.run.fields import duration
from grpo.run.read import headline, read_run

log = logging.getLogger("grpo")

MEASURED = ("accuracy", "accuracy_low", "accuracy_high", "length", "form", "form_low", "form_high", "cut_off", "tasks")
ALWAYS = ("accuracy", "accuracy_low", "accuracy_high", "length", "form")


def write_summary(plan: Plan) -> dict[str, Any]:
    """Write ``summary.json`` and ``report.html`` into the chain's folder, of the stages that are there."""
    rows = [_stage_row(plan, stage) for stage in plan.stages if (State.of(stage.folder) or _NOT).status == "done"]
    if (plan.folder / START).exists():
        rows.insert(0, _row(plan.folder / START, START, "start", 0.0))
    summary: dict[str, Any] = {
        "chain": plan.file.name,
        "seed": plan.chain.seed,
        "stages": rows,
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "evaluation_seconds": round(sum(row.get("evaluation_seconds", 0.0) for row in rows), 3),
    }
    if plan.chain.dollars_per_hour is not None:
        for row in rows:
            row["cost_usd"] = round(plan.chain.dollars_per_hour * row["seconds"] / 3600, 4)
        summary["cost_usd"] = round(sum(row["cost_usd"] for row in rows), 4)
    write_whole(plan.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_page(plan.folder, summary)
    return summary


def write_page(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``report.html``; what it lacks is a line in the log."""
    try:
        from grpo.report.chain_page import page  # matplotlib is slow to load

        write_whole(folder / "report.html", page(folder, summary))
    except ModuleNotFoundError as error:
        log.warning("no report.html: it needs %s, which is not installed", error.name)
    except (OSError, UserError) as error:
        log.warning("no report.html: %s", error)


def lines(summary: dict[str, Any]) -> Iterator[str]:
    """A table for a terminal, a line a stage."""
    rows = [["stage", "kind", "accuracy", "length", "form", "time", ""]]
    rows += [[row["name"], row["kind"], *_texts(row)] for row in summary["stages"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _texts(row: dict[str, Any]) -> list[str]:
    interval = f" [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]" if row["accuracy"] is not None else ""
    rest = f"{row['rows']:,} rows" if "rows" in row else ""
    if "cost_usd" in row:
        rest += f"{', ' if rest else ''}{row['cost_usd']:.2f} $"
    return [
        _number(row["accuracy"], ".3f") + interval,
        _number(row["length"], ".1f"),
        _number(row["form"], ".3f"),
        duration(row["seconds"]),
        rest,
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


_NOT = State("", {})


def _stage_row(plan: Plan, stage: Stage) -> dict[str, Any]:
    state = State.of(stage.folder) or _NOT
    row = _row(stage.folder, stage.name, stage.config.kind, state.seconds)
    if stage.config.makes == "model":
        with suppress(UserError):  # a run whose metrics somebody has removed
            facts = headline(read_run(stage.folder / "run"))
            row |= {"steps": int(facts["steps"])}
            row |= {"train_seconds": round(facts["seconds"], 3)} if "seconds" in facts else {}
    elif stage.config.makes == "rows" and stage.output is not None:
        row |= _of_rows(stage.output)
    return row


def _row(folder: Path, name: str, kind: str, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "kind": kind, **dict.fromkeys(ALWAYS), "seconds": round(seconds, 3)}
    with suppress(OSError, ValueError):
        measured = json.loads((folder / "evaluation.json").read_bytes())
        row |= {key: measured[key] for key in MEASURED if key in measured}
        row["evaluation_seconds"] = measured["seconds"]
    return row


def _of_rows(output: Path) -> dict[str, Any]:
    """Of what a stage kept: how many rows, of which prompts."""
    with output.open("rb") as file:
        found: dict[str, Any] = {"rows": sum(1 for _ in file)}
    with suppress(OSError, ValueError, KeyError, TypeError):
        report = json.loads(output.with_suffix(".report.json").read_bytes())
        found |= {"prompts": report["prompts"], "pass_rate": report["pass_rate"]["mean"], "rules": report["rules"]}
    return found
