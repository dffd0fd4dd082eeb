"""How the curves of a run look: colours, smoothing, lines and areas, axes. What they show is in ``curves.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

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
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "legend.handlelength": 1.4,
    "svg.fonttype": "none",
}


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
    muted="#667085",
    grid="#e6e9ef",
    series=("#2563eb", "#ea6a1a", "#0f9d76", "#8b5cf6", "#d6336c", "#98a2b3", "#b58900", "#0891b2"),
)
# Placeholders in the SVG, replaced by CSS variables: the page sets the colours of its light and its dark theme.
THEMED = Colours(
    paper="#fe0000",
    ink="#fe0001",
    muted="#fe0002",
    grid="#fe0003",
    series=tuple(f"#fe01{i:02x}" for i in range(len(LIGHT.series))),
)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centered moving mean over a twentieth of the run; short runs stay as they are."""
    width = len(values) // 20
    if width < 2:
        return values
    window = np.ones(2 * (width // 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def thinned(values: np.ndarray, most: int = 500) -> np.ndarray:
    """Means of neighbours along the last axis, so that a long run's picture has at most ``most`` points to a curve."""
    size = -(-values.shape[-1] // most)
    whole = values.shape[-1] // size * size
    return values[..., :whole].reshape(*values.shape[:-1], -1, size).mean(-1) if size > 1 else values


def noisy(ax: Axes, run: RunRecord, name: str, colour: str, label: str | None = None) -> None:
    """The smoothed metric, over the raw one drawn faintly."""
    steps, values = run.series(name)
    if not len(steps):
        return
    smoothed = smooth(values)
    if smoothed is not values:
        ax.plot(thinned(steps), thinned(values), color=colour, linewidth=0.8, alpha=0.3)
    ax.plot(thinned(steps), thinned(smoothed), color=colour, label=label, marker="o" if len(steps) == 1 else None)


def stack(
    ax: Axes, run: RunRecord, names: list[str], c: Colours, labels: list[str], *, normalize: bool = False
) -> None:
    """Stacked areas of metrics that add up; a part that a step did not log is 0 there."""
    steps = np.array([row["step"] for row in run.training], dtype=float)
    parts = np.array([smooth(np.array([row.get(name) or 0.0 for row in run.training])) for name in names])
    if normalize:
        parts = parts / np.maximum(parts.sum(0), 1e-12)
    kept = len(c.series)
    if len(parts) > kept:
        parts = np.vstack([parts[: kept - 1], parts[kept - 1 :].sum(0)])
        labels = [*labels[: kept - 1], "other"]
    ax.stackplot(thinned(steps), thinned(parts), labels=labels, colors=c.series, alpha=0.82, linewidth=0)
    legend = ax.legend(loc="lower left", frameon=True, ncols=3, columnspacing=1.0, handletextpad=0.5)
    legend.get_frame().set(facecolor=c.paper, alpha=0.8, linewidth=0)
    ax.set_ylim(bottom=0)


def dress(ax: Axes, c: Colours) -> None:
    ax.set_facecolor("none")
    ax.grid(axis="y", color=c.grid, linewidth=0.9)
    ax.spines["bottom"].set_color(c.grid)
    ax.tick_params(colors=c.muted, labelcolor=c.muted)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))


def finish(ax: Axes, c: Colours) -> None:
    legend = ax.get_legend()
    if legend:
        for text in legend.get_texts():
            text.set_color(c.muted)
    if ax.get_ylim()[1] >= 10_000:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))
    ax.margins(x=0.02)
    ax.set_xlabel("step", color=c.muted, loc="right", labelpad=1)
