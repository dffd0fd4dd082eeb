"""The curves of a run: one panel per question, drawn once for ``curves.png`` and once as themed SVG for the page.

matplotlib's ``Figure`` is used directly: no global state, no display.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, PercentFormatter

from grpo.errors import printable
from grpo.report.drawing import LIGHT, STYLE, THEMED, Colours, End, dress, finish, noisy, points, stack
from grpo.report.judgement import expected
from grpo.report.smoothing import smooth, thinned

if TYPE_CHECKING:
    from grpo.run.read import RunRecord


BARS = "Grey bars: what the recipe expects."


@dataclass(frozen=True)
class Panel:
    """One question and its picture. Shown where any metric that starts with one of ``needs`` was logged. ``draw``
    returns what is to be written beside the curves' ends."""

    title: str
    caption: str
    needs: tuple[str, ...]
    draw: Callable[[Axes, RunRecord, Colours], list[End]]


# ---------------------------------------------------------------------------------------------------------------------
# Panels


def _accuracy(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    steps, accuracy = run.series("eval/accuracy")
    _, low = run.series("eval/accuracy_low")
    _, high = run.series("eval/accuracy_high")
    if len(low) == len(high) == len(steps):
        ax.fill_between(steps, low, high, color=c.series[0], alpha=0.16, linewidth=0)
    bands = [band["high"] for band in expected(run) if band["metric"] == "eval/accuracy"]
    passes = [name for name in run.names("eval/pass@") if name != "eval/pass@1"][-1:]
    labels = [label for name in passes for label in points(ax, run, name, c.series[3], name[5:])]
    ax.plot(steps, accuracy, "o-", color=c.series[0], markersize=4.5, clip_on=False)
    top = max([*accuracy, *high, *bands, *(v for name in passes for v in run.series(name)[1])], default=1.0)
    share_axis(ax, top)
    # The first label stands where the curve does not go.
    below = accuracy[-1] > accuracy[0] > 0.12 * ax.get_ylim()[1]
    place = (6, -12) if below else (6, 6)
    ax.annotate(f"{accuracy[0]:.3f}", (steps[0], accuracy[0]), place, textcoords="offset points", fontsize=8).set_color(
        c.ink
    )
    return [End(float(accuracy[-1]), f"{accuracy[-1]:.3f}", c.ink if len(accuracy) > 1 else c.series[0]), *labels]


def _reward(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    parts = [name for name in run.names("rewards/") if name.endswith("/mean")]
    labels = noisy(ax, run, "reward", c.series[0], "reward" if len(parts) > 1 else "")
    if len(parts) > 1:
        for i, name in enumerate(parts):
            steps, values = run.series(name)
            colour, smoothed = c.series[1 + i % (len(c.series) - 1)], smooth(values)
            ax.plot(thinned(steps), thinned(smoothed), color=colour, linewidth=1.2)
            labels.append(End(float(smoothed[-1]), name.split("/")[1], colour))
    return labels


def _accuracy_by_source(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    names = [name for name in run.names("eval/sources/") if name.endswith("/accuracy")]
    labels = []
    for i, name in enumerate(names):
        labels += points(ax, run, name, c.series[i % len(c.series)], name.split("/")[2])
    share_axis(ax, max((v for name in names for v in run.series(name)[1]), default=1.0))
    return labels


def _reward_by_source(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    names = [name for name in run.names("sources/") if name.endswith("/reward")]
    labels = []
    for i, name in enumerate(names):
        labels += noisy(ax, run, name, c.series[i % len(c.series)], name.split("/")[1])
    return labels


def _length(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    labels = _trained_and_held_out(ax, run, c, "completions/mean_length")
    limit = run.number("rollout.max_completion_length")
    if limit and ax.get_ylim()[1] > 0.6 * limit:
        ax.axhline(limit, color=c.muted, linestyle=":", linewidth=1.2)
        labels.append(End(limit, "limit", c.muted))
    return labels


def _turns(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    return _trained_and_held_out(ax, run, c, "completions/mean_turns")


def _calls(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    labels = _trained_and_held_out(ax, run, c, "tools/call_frequency")
    return labels + noisy(ax, run, "tools/failure_frequency", c.series[4], "share failed")


def _trained_and_held_out(ax: Axes, run: RunRecord, c: Colours, name: str) -> list[End]:
    held_out = "held-out" if len(run.series(f"eval/{name}")[0]) else ""
    labels = noisy(ax, run, name, c.series[0], "training" if held_out else "")
    return labels + points(ax, run, f"eval/{name}", c.series[1], held_out)


def _ends(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    names = [name for name in run.names("completions/ended/") if run.series(name)[1].any()]
    labels = stack(ax, run, names, c, [name.rpartition("/")[2] for name in names], normalize=True)
    ax.set_ylim(0, 1)
    _percent(ax)
    return labels


def _entropy(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    return noisy(ax, run, "entropy", c.series[3])


def _time(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    order = {f"time/{part}": i for i, part in enumerate(("rollout", "score", "train", "sync"))}
    names = sorted(run.names("time/"), key=lambda name: order.get(name, len(order)))
    return stack(ax, run, names, c, [name.removeprefix("time/") for name in names])


def _verdicts(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    """Shares of the verdicts of the reward function that has the most kinds of them."""
    names = run.names("verdicts/")
    functions = {name.split("/")[1] for name in names}
    function = max(sorted(functions), key=lambda f: sum(name.startswith(f"verdicts/{f}/") for name in names))
    names = [name for name in names if name.startswith(f"verdicts/{function}/")]
    names.sort(key=lambda name: -sum(run.series(name)[1]))
    names.sort(key=lambda name: not name.endswith("/correct"))
    verdicts = [name.rpartition("/")[2] for name in names]
    good_first = (c.series[2], *(s for s in c.series if s != c.series[2])) if "correct" in verdicts else c.series
    shades = Colours(c.paper, c.ink, c.muted, c.grid, good_first)
    labels = stack(ax, run, names, shades, [v.replace("_", " ") for v in verdicts], normalize=True)
    ax.set_ylim(0, 1)
    _percent(ax)
    return labels


def _signal(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    shares = {
        "frac_reward_zero_std": "no signal",
        "completions/clipped_ratio": "cut off",
        "frac_unscored": "unscored",
    }
    labels = []
    for i, (name, label) in enumerate(shares.items()):
        steps, values = run.series(name)
        if len(steps) and (i < 2 or values.any()):
            labels += noisy(ax, run, name, c.series[(1, 4, 5)[i]], label)
    ax.set_ylim(0, 1)
    _percent(ax)
    return labels


def _divergence(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    return [
        *noisy(ax, run, "kl", c.series[3], "KL"),
        *noisy(ax, run, "clip_ratio/region_mean", c.series[1], "clipped"),
    ]


def _teacher(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    held_out = "held-out" if len(run.series("eval/teacher_kl")[0]) else ""
    labels = noisy(ax, run, "teacher/kl", c.series[4], "training" if held_out else "")
    return labels + points(ax, run, "eval/teacher_kl", c.series[1], held_out)


def _experts(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    return noisy(ax, run, "router/max_load", c.series[4])


def _grad_norm(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    noisy(ax, run, "grad_norm", c.series[5])
    _, values = run.series("grad_norm")
    positive = values[values > 0]
    if len(positive) and positive.max() > 50 * np.median(positive):
        ax.set_yscale("log")
    return []


def _loss(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    held_out = "held-out" if len(run.series("eval/loss")[0]) else ""
    labels = noisy(ax, run, "loss", c.series[0], "training" if held_out else "")
    return labels + points(ax, run, "eval/loss", c.series[1], held_out)


def _learning_rate(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    ax.plot(*run.series("learning_rate"), color=c.series[7])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return []


def _speed(ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    return noisy(ax, run, "tokens_per_second", c.series[7])


def share_axis(ax: Axes, top: float) -> None:
    """From 0 to the first of 25%, 50% and 100% that is not below ``top``."""
    ax.set_ylim(0, next(nice for nice in (0.25, 0.5, 1.0) if top <= nice or nice == 1.0))
    _percent(ax)


def _percent(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


PANELS = [
    Panel("Held-out accuracy", "Share of unseen tasks solved.", ("eval/accuracy",), _accuracy),
    Panel("Loss", "Nats per completion token.", ("loss", "eval/loss"), _loss),
    Panel("Teacher", "Divergence from the teacher, in nats a token.", ("teacher/kl",), _teacher),
    Panel("Reward", "Mean over the completions of a training step.", ("reward",), _reward),
    Panel("Accuracy by source", "Held-out tasks of each source of data.mix.", ("eval/sources/",), _accuracy_by_source),
    Panel("Reward by source", "Of each source of data.mix, in training.", ("sources/",), _reward_by_source),
    Panel("Completion length", "Mean, in tokens.", ("completions/mean_length",), _length),
    Panel("Turns", "Of the model, mean of an episode.", ("completions/mean_turns",), _turns),
    Panel("Tool calls", "Calls an episode, and the share of calls that failed.", ("tools/call_frequency",), _calls),
    Panel("How episodes ended", "Shares of a training step's.", ("completions/ended/",), _ends),
    Panel("Entropy", "Of the next token, in nats; near 0, exploration ends.", ("entropy",), _entropy),
    Panel("Verdicts", "Why completions were rewarded or not.", ("verdicts/",), _verdicts),
    Panel(
        "Without signal, cut off",
        "Groups of equal rewards teach nothing; completions cut off at the limit have no answer.",
        ("frac_reward_zero_std",),
        _signal,
    ),
    Panel("Distance", "To the reference model; tokens that were clipped.", ("kl",), _divergence),
    Panel("Busiest expert", "Its load over the mean load; 1 is even.", ("router/max_load",), _experts),
    Panel("Gradient norm", "Before clipping.", ("grad_norm",), _grad_norm),
    Panel("Learning rate", "Of the optimizer.", ("learning_rate",), _learning_rate),
    Panel("Seconds per step", "By part.", ("time/",), _time),
    Panel("Tokens per second", "Over the whole step.", ("tokens_per_second",), _speed),
]


def panels(run: RunRecord) -> list[Panel]:
    """The panels that this run has numbers for. A GRPO loss and a constant learning rate say nothing."""
    names = run.names()
    bands = {band["metric"].removeprefix("eval/") for band in expected(run)}
    grpo = "reward" in names or "completions/mean_length" in names  # also one that learns from a teacher alone
    hidden = {"Loss", "Learning rate", "Tokens per second"} if grpo else set()
    return [
        replace(panel, caption=f"{panel.caption} {BARS}") if bands & _measures(panel) else panel
        for panel in PANELS
        if panel.title not in hidden and any(len(run.series(n)[0]) for n in names if n.startswith(panel.needs))
    ]


def _measures(panel: Panel) -> set[str]:
    """What a band of ``expect`` can be drawn over, in training and evaluation alike."""
    return {name.removeprefix("eval/") for name in panel.needs}


def draw(panel: Panel, ax: Axes, run: RunRecord, c: Colours) -> list[End]:
    """The panel's curves, over bars where the recipe expects them; a line down where the run went back to its best."""
    for band in expected(run):
        if band["step"] <= run.steps and band["metric"].removeprefix("eval/") in _measures(panel):
            ax.vlines(band["step"], band["low"], band["high"], color=c.muted, alpha=0.4, linewidth=6, clip_on=False)
    for row in run.rollbacks:
        ax.axvline(row["step"], color=c.muted, linestyle="--", linewidth=1.0)
    return panel.draw(ax, run, c)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def curves_png(run: RunRecord, facts: dict[str, float]) -> bytes:
    """All panels as one picture."""
    shown = panels(run)
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        size = (4.2 * columns, 2.75 * rows + 0.6)
        figure = Figure(figsize=size, dpi=140, layout=layout, facecolor=LIGHT.paper)
        figure.suptitle(summary(run, facts), x=0.01, ha="left", fontsize=12, color=LIGHT.ink)
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for panel, ax in zip(shown, axes, strict=False):  # panels first, so that zip takes no axes that stay unused
            dress(ax, LIGHT)
            finish(ax, LIGHT, run.steps, draw(panel, ax, run, LIGHT))
            ax.set_title(panel.title, loc="left", fontweight="bold", color=LIGHT.ink, fontsize=10)
        for ax in list(axes):
            ax.remove()
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def curves_svg(run: RunRecord) -> list[tuple[Panel, str]]:
    """Each panel as SVG markup to put into a page that defines ``--ink --muted --grid --paper --series-0…``."""

    def themed(panel: Panel) -> str:
        return themed_svg(panel.title, run.steps, lambda ax: draw(panel, ax, run, THEMED))

    return [(panel, themed(panel)) for panel in panels(run)]


def summary(run: RunRecord, facts: dict[str, float]) -> str:
    """``demo: held-out accuracy 0.16 → 0.44, completion length 46 → 99 tokens, 405 s``."""
    parts = []
    if "accuracy_before" in facts:
        parts.append(f"held-out accuracy {facts['accuracy_before']:.2f} → {facts['accuracy_after']:.2f}")
    elif "loss_before" in facts and "reward_before" not in facts:
        parts.append(f"loss {facts['loss_before']:.3f} → {facts['loss_after']:.3f}")
    if "length_before" in facts:
        parts.append(f"completion length {facts['length_before']:.0f} → {facts['length_after']:.0f} tokens")
    if "seconds" in facts:
        parts.append(f"{facts['seconds']:,.0f} s")
    return printable(f"{run.name}: " + ", ".join(parts) if parts else run.name)


def themed_svg(title: str, steps: int, draw: Callable[[Axes], list[End]], along: str = "step") -> str:
    """A picture of one panel, in colours that the page's style sheet sets; ``along`` names what it goes by. Its ids are
    unique to the title, and the same at every drawing."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(4.6, 2.6))
        figure.subplots_adjust(
            left=0.115, right=0.8, bottom=0.165, top=0.965
        )  # alike in all panels, with room for labels
        figure.patch.set_alpha(0.0)
        ax = figure.add_subplot()
        dress(ax, THEMED)
        finish(ax, THEMED, steps, draw(ax), along)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    markup = file.getvalue()
    markup = markup[markup.index("<svg") :]
    for name in ("paper", "ink", "muted", "grid"):
        markup = markup.replace(getattr(THEMED, name), f"var(--{name})")
    for i, colour in enumerate(THEMED.series):
        markup = markup.replace(colour, f"var(--series-{i})")
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    markup = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", markup, count=1)
    return markup.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
