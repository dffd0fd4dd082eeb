"""A comparison of runs for people: a table for a terminal, and ``compare.html``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo.errors import UserError
from grpo.files import write_whole
from grpo.report.attempts import filtered
from grpo.report.compare import EXPLAINED, FACTS, Side, compare, paired, said_of, shared, tone_of
from grpo.report.compare_suites import of_runs
from grpo.report.markup import document, e

COLOURS = 8  # of page.css
WIDTH = 80  # of what is written to a terminal
MOST = 4  # sides whose completions stand beside each other


def write_comparison(folders: Sequence[Path], out: Path) -> list[str]:
    """Write the page to ``out``; returns the lines for a terminal. Raises UserError as ``compare`` does."""
    try:
        from grpo.report.compare_curves import curves
    except ModuleNotFoundError as error:
        raise UserError(f"the comparison needs {error.name}, which is not installed") from error

    sides = compare(folders)
    figures = "".join(
        f"<figure><figcaption><b>{e(title)}</b></figcaption>{svg}</figure>" for title, svg in curves(sides)
    )
    tests = "".join(f'<li class="{tone}">{e(line)}</li>' for tone, line in _tests(sides))
    runs = "".join(
        f"<tr><th>{e(side.letter)}</th><td>{e(', '.join(str(run.folder) for run in side.runs))}</td></tr>"
        for side in sides
    )
    suites = list(of_runs([[run.folder for run in side.runs] for side in sides], [side.letter for side in sides]))
    of_suites = "".join(f"<li>{e(line)}</li>" for line in suites)
    body = f"""<header><h1>{len(folders)} runs beside each other</h1></header>
<section class="wide">{_table(sides)}</section>
<section><ul class="findings">{tests}</ul><p class="note">{e(EXPLAINED)}</p></section>
{f'<section><h2>Suites</h2><ul class="findings">{of_suites}</ul></section>' if suites else ""}
<section><h2>Curves</h2><p class="note">Each run thin; the mean over seeds thick.</p>
<div class="curves">{figures}</div></section>
{_completions(sides)}
<section><h2>Runs</h2><table>{runs}</table></section>"""
    try:
        write_whole(out, document("runs beside each other", body))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return [*terminal(sides), *([""] if suites else []), *suites, "", f"{out}"]


def terminal(sides: Sequence[Side]) -> Iterator[str]:
    """A line for each figure and a column for each side, headed by its letter; what the letters stand for is first.
    Sides that do not fit beside the others come below them."""
    for side in sides:
        yield from textwrap.wrap(f"{side.letter}  {side.label}", WIDTH, subsequent_indent="   ")
    yield ""
    rows = [["", *(side.letter for side in sides)], *_figures(sides)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides) + 1)]
    for block in _blocks(widths):
        for row in rows:
            yield "  ".join(row[i].ljust(widths[i]) for i in (0, *block)).rstrip()
        yield ""
    for _, text in _tests(sides):
        yield from textwrap.wrap(text, WIDTH)
    yield from textwrap.wrap(EXPLAINED, WIDTH)


def _blocks(widths: Sequence[int]) -> list[list[int]]:
    """The columns behind the first, those together that fit beside it."""
    blocks: list[list[int]] = []
    taken = WIDTH
    for i, width in enumerate(widths[1:], start=1):
        if taken + 2 + width > WIDTH:
            blocks.append([])
            taken = widths[0]
        blocks[-1].append(i)
        taken += 2 + width
    return blocks


def _figures(sides: Sequence[Side]) -> list[list[str]]:
    """A row for each figure that a side has: its name, and its mean on every side."""
    return [
        [name, *(side.means[name].text() if name in side.means else "-" for side in sides)]
        for name in FACTS
        if any(name in side.means for side in sides)
    ]


def _tests(sides: Sequence[Side]) -> list[tuple[str, str]]:
    """Of each side against the first: whether it is better or worse, as a colour, and the test in words."""
    if len(sides) < 2:
        return [("plain", "These are seeds of one recipe: there is nothing to test.")]
    found = [(paired(sides[0], other), other.letter) for other in sides[1:]]
    return [(tone_of(one), said_of(one, sides[0].letter, letter)) for one, letter in found]


def _table(sides: Sequence[Side]) -> str:
    head = "".join(
        f'<th class="side">{_letter(i, side)} {e(side.label).replace("=", "=<wbr>")}</th>'
        for i, side in enumerate(sides)
    )
    rows = "".join(
        f"<tr><th>{e(name)}</th>{''.join(f'<td>{e(text)}</td>' for text in texts)}</tr>"
        for name, *texts in _figures(sides)
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _letter(i: int, side: Side) -> str:
    """In the colour of the side's curves."""
    return f'<b style="color: var(--series-{i % COLOURS})">{e(side.letter)}</b>'


def _completions(sides: Sequence[Side]) -> str:
    """What the sides answered at the end to prompts that all of them held out, where they differ first."""
    sides = [side for side in sides if side is sides[0] or shared([sides[0], side])][:MOST]
    prompts = shared(sides)
    if not prompts or len(sides) < 2:
        return ""
    sets = [{i: side.answer(prompt) for i, prompt in enumerate(prompts)} for side in sides]
    kinds = {i: _kind([found[i].share >= 0.5 for found in sets]) for i in range(len(prompts))}
    one = sides[0].letter
    labels = {
        "gained": f"solved by others than {one}",
        "lost": f"solved by {one}, not by all",
        "unsolved": "solved by none",
        "kept": "solved by all",
    }
    said = (
        "The last evaluation of each side's first run that held the prompt out. What their completions begin with in "
        "common is dimmed."
    )
    titles = [f"{side.letter} {side.label}" for side in sides]
    return (
        f'<section><h2>The same tasks, side by side</h2><p class="note">{said}</p>'
        f"{filtered(kinds, labels, sets, titles)}</section>"
    )


def _kind(solved: Sequence[bool]) -> str:
    if all(solved):
        return "kept"
    return "lost" if solved[0] else "gained" if any(solved) else "unsolved"
