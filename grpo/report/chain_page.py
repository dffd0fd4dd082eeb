"""The page of a chain: every stage's accuracy, length, form and cost, and the same tasks as the stages answer them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from grpo.report.attempts import Attempts, filtered
from grpo.report.curves import share_axis, themed_svg
from grpo.report.drawing import THEMED, End
from grpo.report.markup import document, e
from grpo.run.fields import duration
from grpo.run.read import read_rollouts

MOST = 4  # stages whose completions stand beside each other
Row = Mapping[str, Any]


def page(folder: Path, summary: Mapping[str, Any]) -> str:
    """``summary`` is what ``summary.json`` holds; stages' folders are in ``folder``."""
    stages: Sequence[Row] = summary["stages"]
    measured = [row for row in stages if row["accuracy"] is not None and row["kind"] != "eval"]  # on the same tasks
    body = f"""<header><h1>{e(folder.resolve().name)}: {len(stages)} stages</h1>
<p>{e(_total(summary))}</p></header>
<section class="wide">{_table(folder, stages)}<p class="note">{e(_explained(measured))}</p></section>
{_figures(measured)}{_kept(stages)}{_side_by_side(folder, measured)}"""
    return document(f"{folder.resolve().name}: a chain", body)


def _total(summary: Mapping[str, Any]) -> str:
    said = f"{duration(summary['seconds'])} in stages, {duration(summary['evaluation_seconds'])} measuring"
    return said + (f", {summary['cost_usd']:.2f} dollars" if "cost_usd" in summary else "")


def _explained(measured: Sequence[Row]) -> str:
    if not measured:
        return "No model was measured on tasks that all share: the chain has no section evaluate."
    tasks = {row["tasks"] for row in measured if "tasks" in row}
    on = f" on {', '.join(f'{n:,}' for n in sorted(tasks))} held-out tasks" if tasks else ""
    return (
        f"Accuracy{on}, with its 95% interval over questions; length in tokens; form as the reward measures it that "
        "evaluate.form names. A stage of kind eval has tasks of its own. Time is that of the stage's processes, over "
        "all attempts, without measuring."
    )


def _table(folder: Path, stages: Sequence[Row]) -> str:
    heads = ["stage", "kind", "accuracy", "length", "cut off", "form", "rows", "steps", "time", "dollars"]
    rows = [[_linked(folder, row), *(e(text) for text in _texts(row))] for row in stages]
    kept = [i for i in range(len(heads)) if i < 2 or any(row[i] for row in rows)]
    head = "".join(f"<th>{heads[i]}</th>" for i in kept)
    body = "".join(f"<tr>{''.join(f'<td>{row[i]}</td>' for i in kept)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _linked(folder: Path, row: Row) -> str:
    page = Path(row["name"]) / "run" / "report.html"
    name = e(row["name"])
    return f'<a href="{e(page.as_posix())}">{name}</a>' if (folder / page).exists() else name


def _texts(row: Row) -> list[str]:
    def number(key: str, form: str) -> str:
        value = row.get(key)
        return "" if value is None else format(value, form)

    def interval(key: str) -> str:
        low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
        return number(key, ".3f") + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")

    return [
        str(row["kind"]),
        interval("accuracy"),
        number("length", ".1f"),
        number("cut_off", ".1%"),
        interval("form"),
        number("rows", ",d"),
        number("steps", ",d"),
        duration(row["seconds"]),
        number("cost_usd", ".2f"),
    ]


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(measured: Sequence[Row]) -> str:
    titles = {"accuracy": "Held-out accuracy", "length": "Completion length, tokens", "form": "Form"}
    drawn = [
        (title, themed_svg(title, len(measured) - 1, partial(_draw, rows=measured, key=key), "stage"))
        for key, title in titles.items()
        if len(measured) > 1 and all(row.get(key) is not None for row in measured)
    ]
    figures = "".join(f"<figure><figcaption><b>{e(title)}</b></figcaption>{svg}</figure>" for title, svg in drawn)
    return f'<section><h2>Stage by stage</h2><div class="curves">{figures}</div></section>' if drawn else ""


def _draw(ax: Axes, rows: Sequence[Row], key: str) -> list[End]:
    """A point a stage, with its interval where it has one, and the stages' names below."""
    colour, places = THEMED.series[0], range(len(rows))
    values = [float(row[key]) for row in rows]
    if all(row.get(f"{key}_low") is not None for row in rows):
        low, high = ([float(row[f"{key}_{end}"]) for row in rows] for end in ("low", "high"))
        ax.vlines(places, low, high, color=colour, linewidth=1.4, alpha=0.6)
    ax.plot(places, values, "o-", color=colour, markersize=5, linewidth=1.2, clip_on=False)
    if key == "accuracy":
        share_axis(ax, max(values))
    for place, row in zip(places, rows, strict=True):
        ax.annotate(
            str(row["name"])[:14], (place, values[place]), (0, 7), textcoords="offset points",
            ha="center", fontsize=8, color=THEMED.muted, annotation_clip=False,
        )  # fmt: skip
    return []


# --- what was kept ---------------------------------------------------------------------------------------------------


def _kept(stages: Sequence[Row]) -> str:
    parts = []
    for row in stages:
        if "rules" not in row:
            continue
        rules = "".join(
            f"<tr><th>{e(one['rule'])}</th><td>{one['completions']:,}</td><td>{one['prompts']:,}</td></tr>"
            for one in row["rules"]
        )
        rate = "" if row.get("pass_rate") is None else f"; mean pass rate {row['pass_rate']:.3f}"
        parts.append(
            f"<h3>{e(row['name'])}: {row['rows']:,} rows{e(rate)}</h3>"
            f"<table><tr><th>after</th><td>completions</td><td>prompts</td></tr>{rules}</table>"
        )
    return f"<section><h2>What was kept of samples</h2>{''.join(parts)}</section>" if parts else ""


# --- the same tasks --------------------------------------------------------------------------------------------------


def _side_by_side(folder: Path, measured: Sequence[Row]) -> str:
    """What the first and the last stages answered to the same held-out tasks, where the last differs from the first."""
    chosen = [*measured[:1], *measured[1:][-(MOST - 1) :]]
    sets = [_attempts(folder / row["name"]) for row in chosen]
    shared = sorted(set.intersection(*map(set, sets))) if len(sets) > 1 else []
    if not shared:
        return ""
    places = dict(enumerate(shared))
    numbered = [{i: found[place] for i, place in places.items()} for found in sets]
    kinds = {i: _kind(numbered[0][i].share >= 0.5, numbered[-1][i].share >= 0.5) for i in places}
    labels = {
        "gained": f"solved by {chosen[-1]['name']} alone",
        "lost": f"solved by {chosen[0]['name']} alone",
        "unsolved": "solved by neither",
        "kept": "solved by both",
    }
    said = "The first few of each kind. What the completions begin with in common is dimmed."
    titles = [str(row["name"]) for row in chosen]
    return (
        f'<section><h2>The same tasks, stage by stage</h2><p class="note">{said}</p>'
        f"{filtered(kinds, labels, numbered, titles)}</section>"
    )


def _attempts(stage: Path) -> dict[tuple[int, int], Attempts]:
    """By seed and prompt, what the stage's model answered."""
    try:
        judge = json.loads((stage / "evaluation.json").read_bytes())["judged_by"]
    except (OSError, ValueError, KeyError):
        return {}
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in read_rollouts(stage / "evaluation.jsonl"):
        groups.setdefault((row["seed"], row["prompt_id"]), []).append(row)
    return {
        place: Attempts(
            rows[0],
            sum((row["rewards"][judge] or 0) >= 1 for row in rows),
            len(rows),
            all(row["rewards"][judge] is not None for row in rows),
        )
        for place, rows in groups.items()
    }


def _kind(first: bool, last: bool) -> str:
    return {(False, True): "gained", (True, False): "lost", (True, True): "kept", (False, False): "unsolved"}[
        first, last
    ]
