"""A run in a terminal: its curves and newest completions, until it ends. It only reads the run's folder.

Nothing that a completion holds reaches the terminal as a control character.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from grpo.errors import UserError, printable
from grpo.health.history import ROLLED_BACK
from grpo.health.watch import Watch
from grpo.report.braille import nice, plot
from grpo.report.conversation import in_a_line, notes_of
from grpo.report.smoothing import smooth
from grpo.run.fields import COST, duration, fitting
from grpo.run.folder import is_running
from grpo.run.read import RunRecord, headline, mapping, read_rollouts, read_run

SECONDS = 2.0  # between two looks at the folder
# Title, metric, and where its axis ends; None: behind the largest value.
CURVES: tuple[tuple[str, str, float | None], ...] = (
    ("held-out accuracy", "eval/accuracy", 1.0),
    ("reward", "reward", None),
    ("teacher", "teacher/kl", None),
    ("length", "completions/mean_length", None),
    ("turns", "completions/mean_turns", None),
    ("calls of tools", "tools/call_frequency", None),
    ("entropy", "entropy", None),
    ("held-out loss", "eval/loss", None),
    ("loss", "loss", None),
)
HEIGHTS = (5, 4, 3)  # lines of a curve, the first that leaves room for completions
COMPLETIONS = 3
LINES = 4  # of a completion, at most


def watch(folder: Path, *, once: bool = False, console: Console | None = None) -> None:
    """Show the run until it ends; with ``once``, or where standard output is no terminal, as it is now.

    Raises UserError where the folder holds no run.
    """
    console = console or Console(highlight=False)
    if not folder.is_dir():
        read_run(folder)  # which says what is wrong
    if once or not console.is_terminal or not is_running(folder):
        console.print(picture(read_run(folder), console))
        return
    seen: tuple[int, int, int] | None = None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while is_running(folder):
            now = (_size(folder / "metrics.jsonl"), *console.size)
            if now != seen:  # a long run's metrics take a second to read
                seen = now
                live.update(_now(folder, console, console.height), refresh=True)
            time.sleep(SECONDS)
    console.print(_now(folder, console))
    console.print(f"{printable(str(folder))} has ended")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _now(folder: Path, console: Console, height: int | None = None) -> Text:
    try:
        return picture(read_run(folder), console, height)
    except UserError:
        if not is_running(folder):
            raise
        return Text(f"{printable(str(folder))}: waiting for the first step", no_wrap=True, overflow="ellipsis")


def picture(run: RunRecord, console: Console, height: int | None = None) -> Text:
    """What is shown, no line wider than the console, and with ``height`` no more lines: curves and completions get
    shorter where it is low."""
    text = Text(no_wrap=True, overflow="crop", end="")
    ascii_only = not (console.encoding or "").startswith("utf")
    for line, style in _fitted(run, console.width, height, ascii_only=ascii_only)[:height]:
        text.append(printable(line)[: console.width], style=style).append("\n")
    if height is not None:
        text.right_crop(1)  # a newline after the last line would scroll the first away
    return text


Line = tuple[str, str]  # and its style


def _fitted(run: RunRecord, width: int, height: int | None, *, ascii_only: bool) -> list[Line]:
    head = list(_head(run, width))
    for curve in HEIGHTS:
        lines = head + list(_curves(run, width, curve, ascii_only=ascii_only))
        if height is None or height - len(lines) >= 2 + 2 * COMPLETIONS:
            break
    room = None if height is None else height - len(lines) - 2  # below a blank line and a title
    return lines + list(_completions(run, width, room))


def _head(run: RunRecord, width: int) -> Iterator[Line]:
    yield "  ".join(fitting([f"{run.name}: {_progress(run)}", *_facts(run)], width)), "bold"
    for name, statement in _health(run).items():
        for line in textwrap.wrap(f"health: {name}: {statement}", width, subsequent_indent="  "):
            yield line, "bold red"
    for row in run.rollbacks:
        yield f"rollback after step {row['step']}, to the best model: step {row[ROLLED_BACK]:.0f}", "red"


def _curves(run: RunRecord, width: int, height: int, *, ascii_only: bool) -> Iterator[Line]:
    """Each curve with ``height`` lines below its title, two abreast where that leaves them readable."""
    shown = [curve for curve in CURVES if len(run.series(curve[1])[0])]
    if any(name == "reward" for _, name, _ in shown):
        shown = [curve for curve in shown if curve[1] != "loss"]  # that of a GRPO step says nothing
    abreast = 2 if width >= 72 else 1
    each = (width - 3 * (abreast - 1)) // abreast
    for i in range(0, len(shown), abreast):
        boxes = [_box(run, *curve, (each, height), ascii_only=ascii_only) for curve in shown[i : i + abreast]]
        yield "", ""
        yield from (
            ("   ".join(parts).rstrip(), "bold" if j == 0 else "") for j, parts in enumerate(zip(*boxes, strict=True))
        )


def _progress(run: RunRecord) -> str:
    total = run.number("training.max_steps")
    return f"step {run.steps}/{total:.0f}" if total else f"step {run.steps}"


def _facts(run: RunRecord) -> list[str]:
    facts = headline(run)
    parts = []
    if "accuracy_after" in facts:
        parts.append(f"accuracy {facts['accuracy_before']:.3f} -> {facts['accuracy_after']:.3f}")
    if "seconds" in facts:
        parts.append(f"{duration(facts['seconds'])} in steps")
    if COST in facts:
        parts.append(f"${facts[COST]:.2f}")
    return parts


def _health(run: RunRecord) -> dict[str, str]:
    """The rules that hold now."""
    actions = {name: action for name, action in mapping(run.setting("health")).items() if isinstance(action, str)}
    seen = Watch(actions)
    seen.see_all(run.rows())
    return seen.holding


def _box(
    run: RunRecord, title: str, name: str, top: float | None, size: tuple[int, int], *, ascii_only: bool
) -> list[str]:
    """A title with the last value, and below it the curve with its axis' ends; each line as wide as ``size`` says."""
    width, height = size
    steps, values = run.series(name)
    top = top or nice(float(max(values.max(), 0.0)))
    margin = max(len(f"{top:g}"), 1) + 1
    across = max(1, width - margin - 1)
    curve = plot(list(steps), list(smooth(values)), across, height, right=run.steps, top=top, ascii_only=ascii_only)
    bar = "|" if ascii_only else "│"
    marks = {0: f"{top:g}", height - 1: "0"}
    last = float(values[-1])
    lines = [f"{title} {last:.3f}" if last == 0 or 0.001 <= last < 10 else f"{title} {last:.4g}"]
    lines += [f"{marks.get(i, ''):>{margin - 1}} {bar}{line}" for i, line in enumerate(curve)]
    return [line[:width].ljust(width) for line in lines]


def _completions(run: RunRecord, width: int, room: int | None) -> Iterator[Line]:
    """The best, the middle and the worst paid, in ``room`` lines below the title; fewer where that is short."""
    count = COMPLETIONS if room is None else min(COMPLETIONS, room // 2)
    files = sorted((run.folder / "rollouts").glob("step_*.jsonl"))
    if not files or count < 1:
        return
    lines = LINES if room is None else min(LINES, room // count - 1)
    rows = list(read_rollouts(files[-1]))
    best = sorted(rows, key=lambda row: -(row.get("reward") or 0.0))
    yield "", ""
    step = files[-1].stem.removeprefix("step_").lstrip("0")
    yield f"newest completions (step {step}): the best, middle and worst paid of {len(rows)}"[:width], "bold"
    places = dict.fromkeys([0, len(best) // 2, len(best) - 1]) if best else {}
    for place in list(places)[:count]:
        row = best[place]
        reward = "unscored" if row.get("reward") is None else f"reward {row['reward']:.3g}"
        ended = [str(row.get("status", "")), *notes_of(row)]
        style = "green" if (row.get("reward") or 0.0) >= 1 else "red"
        yield (
            "  ".join([f"#{row.get('prompt_id', '?')}", reward, f"{row.get('num_tokens', '?')} tokens", *ended]),
            style,
        )
        said = in_a_line(turns) if (turns := row.get("turns")) else str(row.get("completion", ""))
        whole = " ".join(printable(said[: 4 * LINES * width]).split())
        wrapped = textwrap.wrap(whole, max(10, width - 2), max_lines=lines, placeholder=" ...")
        yield from ((f"  {line}", "") for line in wrapped)
