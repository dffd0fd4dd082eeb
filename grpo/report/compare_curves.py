"""The curves of several runs in one picture each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from grpo.report.compare import Side
from grpo.report.curves import share_axis, themed_svg
from grpo.report.drawing import THEMED, End
from grpo.report.smoothing import smooth, thinned

CURVES = {
    "Held-out accuracy": "eval/accuracy",
    "Reward": "reward",
    "Divergence from the teacher": "teacher/kl",
    "Completion length": "completions/mean_length",
    "Entropy": "entropy",
    "Loss": "eval/loss",
}


def curves(sides: Sequence[Side]) -> list[tuple[str, str]]:
    """Title and SVG of each metric that any run has logged."""
    steps = max(run.steps for side in sides for run in side.runs)
    return [
        (title, themed_svg(title, steps, partial(_draw, sides=sides, name=name)))
        for title, name in CURVES.items()
        if any(len(run.series(name)[0]) for side in sides for run in side.runs)
    ]


def _draw(ax: Axes, sides: Sequence[Side], name: str) -> list[End]:
    labels: list[End] = []
    for i, side in enumerate(sides):
        colour = THEMED.series[i % len(THEMED.series)]
        found = [run.series(name) for run in side.runs]
        found = [
            (steps, values if name.startswith("eval/") else smooth(values)) for steps, values in found if len(steps)
        ]
        for steps, values in found:
            alone = len(found) == 1
            ax.plot(
                thinned(steps),
                thinned(values),
                color=colour,
                linewidth=2.0 if alone else 0.9,
                alpha=1 if alone else 0.45,
                marker="o" if len(steps) == 1 else None,
            )
        if not found:
            continue
        common = found[0][0]
        for steps, _ in found[1:]:
            common = np.intersect1d(common, steps)
        if len(found) > 1 and len(common):
            mean = np.mean([values[np.isin(steps, common)] for steps, values in found], axis=0)
            ax.plot(thinned(common), thinned(mean), color=colour, linewidth=2.2)
        end = np.mean([values[-1] for _, values in found])
        labels.append(End(float(end), side.letter, colour))
    if name == "eval/accuracy":
        share_axis(ax, max((run.series(name)[1].max(initial=0) for side in sides for run in side.runs), default=1.0))
    return labels
