"""How the curves of a run look: colours, smoothing, lines and areas, axes. What they show is in ``curves.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from grpo.report.smoothing import smooth, thinned

if TYPE_CHECKING:
    from grpo.run.read import RunRecord

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.parse_math": False,  # two $ in a run's name are no formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}

LINE = 0.085  # height of a label, as a share of the axes


@dataclass(frozen=True)
class Colours:
    """``ink`` for text, ``muted`` for ticks, ``grid`` for lines behind, ``series`` for data, strongest first."""

    paper: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Colours(
    paper="#ffffff",
    ink="#1c2230",
    muted="#596275",
    grid="#e6e9ef",
    series=("#2563eb", "#c2410c", "#0b7a5b", "#7c3aed", "#be185d", "#667085", "#8a6500", "#0e7490"),
)
# Placeholders in the SVG, replaced by CSS variables: the page sets the colours of its light and its dark theme.
THEMED = Colours(
    paper="#fe0000",
    ink="#fe0001",
    muted="#fe0002",
    grid="#fe0003",
    series=tuple(f"#fe01{i:02x}" for i in range(len(LIGHT.series))),
)


@dataclass(frozen=True)
class End:
    """A label beside the right end of a curve or an area: where it would best stand, what it says, its colour."""

    y: float
    text: str
    colour: str


def noisy(ax: Axes, run: RunRecord, name: str, colour: str, label: str = "") -> list[End]:
    """The smoothed metric, over the raw one drawn faintly. Returns its label, if it has one."""
    steps, values = run.series(name)
    if not len(steps):
        return []
    smoothed = smooth(values)
    if smoothed is not values:
        ax.plot(thinned(steps), thinned(values), color=colour, linewidth=0.8, alpha=0.3)
    ax.plot(thinned(steps), thinned(smoothed), color=colour, marker="o" if len(steps) == 1 else None)
    return [End(float(smoothed[-1]), label, colour)] if label else []


def points(ax: Axes, run: RunRecord, name: str, colour: str, label: str = "") -> list[End]:
    """A metric of evaluations, as points with a line between them. Returns its label, if it has one."""
    steps, values = run.series(name)
    if not len(steps):
        return []
    ax.plot(steps, values, "o-", color=colour, markersize=4, linewidth=1.2, clip_on=False)
    return [End(float(values[-1]), label, colour)] if label else []


def stack(
    ax: Axes, run: RunRecord, names: list[str], c: Colours, labels: list[str], *, normalize: bool = False
) -> list[End]:
    """Stacked areas of metrics that add up; a part that a step did not log is 0 there. Returns the labels."""
    steps = np.array([row["step"] for row in run.training], dtype=float)
    parts = np.array([smooth(np.array([row.get(name) or 0.0 for row in run.training])) for name in names])
    if normalize:
        parts = parts / np.maximum(parts.sum(0), 1e-12)
    kept = len(c.series)
    if len(parts) > kept:
        parts = np.vstack([parts[: kept - 1], parts[kept - 1 :].sum(0)])
        labels = [*labels[: kept - 1], "other"]
    ax.stackplot(thinned(steps), thinned(parts), colors=c.series, alpha=0.82, linewidth=0)
    tops = parts[:, -1].cumsum()
    middles = tops - parts[:, -1] / 2
    return [End(float(y), label, colour) for y, label, colour in zip(middles, labels, c.series, strict=False)]


def dress(ax: Axes, c: Colours) -> None:
    ax.set_facecolor("none")
    ax.grid(axis="y", color=c.grid, linewidth=0.9)
    ax.spines["bottom"].set_color(c.grid)
    ax.tick_params(colors=c.muted, labelcolor=c.muted)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))


def finish(ax: Axes, c: Colours, steps: int, labels: list[End], along: str = "step") -> None:
    """Axes from 0, over the whole run in every panel alike; the labels beside the curves' ends."""
    low, high = ax.get_ylim()
    if ax.get_yscale() == "linear":
        least, most = ax.dataLim.intervaly
        low = low if least < 0 and low < -0.06 * high else 0.0
        high = (
            1.0 if least == most == 0 and high < 1 else high if high > 0 else 1.0
        )  # a curve that is 0 lies at the foot
        marks = ax.yaxis.get_major_locator().tick_values(low, high)
        ax.set_ylim(low, next((mark for mark in marks if mark >= high * (1 - 1e-9)), high))  # ends at a mark
    ax.set_xlim(0, max(1, steps))
    if ax.get_ylim()[1] >= 10_000:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))
    _label(ax, labels)
    ax.set_xlabel(along, color=c.muted, loc="right", labelpad=1)


def _label(ax: Axes, labels: list[End]) -> None:
    """Write each label at its curve's end, right of the axes, moved as little as keeps them apart."""
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log":
        places = [(math.log(max(end.y, low)) - math.log(low)) / (math.log(high) - math.log(low)) for end in labels]
    else:
        places = [(end.y - low) / (high - low) for end in labels]
    order = sorted(range(len(labels)), key=lambda i: places[i])
    heights = apart([min(1.0, max(0.0, places[i])) for i in order], LINE)
    for i, height in zip(order, heights, strict=True):
        text = labels[i].text if len(labels[i].text) <= 14 else f"{labels[i].text[:13]}…"
        ax.annotate(
            text, (1.0, height), (5, 0), xycoords="axes fraction", textcoords="offset points",
            ha="left", va="center", fontsize=8, color=labels[i].colour, annotation_clip=False,
        )  # fmt: skip


def apart(heights: list[float], gap: float) -> list[float]:
    """Rising heights in [0, 1], moved so that neighbours are at least ``gap`` apart: up first, then down from 1."""
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    if heights and heights[-1] > 1.0:
        heights[-1] = 1.0
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - gap)
    return heights
