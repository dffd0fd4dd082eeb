"""The numbers of a run as short texts for a screen: which of them, how each is written, and what fits into a width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Metrics = Mapping[str, float | None]


class Shown(NamedTuple):
    """A metric on the screen: its label, its key, how its value is written, and the columns that its value takes."""

    label: str
    key: str
    text: Callable[[float], str]
    width: int


def _count(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.0f}%"


def _small(value: float) -> str:
    return f"{value:.3g}"


def _fixed(value: float) -> str:
    return f"{value:.3f}"


def _tenths(value: float) -> str:
    return f"{value:.1f}"


def dollars(value: float) -> str:
    return f"${value:.2f}" if value >= 0.005 or value <= 0 else "<$0.01"


COST = "cost_usd_wall_clock"
# What matters while training, most important first; what a run does not log is not shown.
TRAINING = [
    Shown("loss", "loss", _fixed, 6),
    Shown("reward", "reward", _fixed, 6),
    Shown("length", "completions/mean_length", _count, 5),
    Shown("turns", "completions/mean_turns", _tenths, 4),
    Shown("calls", "tools/call_frequency", _tenths, 4),
    Shown("cut", "completions/clipped_ratio", _share, 4),
    Shown("no-signal", "frac_reward_zero_std", _share, 4),
    Shown("entropy", "entropy", _fixed, 6),
    Shown("kl", "kl", _small, 8),
    Shown("teacher", "teacher/kl", _small, 8),
    Shown("grad", "grad_norm", _small, 8),
]
SPEED = Shown("tok/s", "tokens_per_second", _count, 5)
PACE = Shown("s/step", "step_time", _small, 5)
SPENT = Shown("cost", COST, dollars, 6)
EVALUATION = [
    Shown("loss", "eval/loss", _fixed, 6),
    Shown("teacher", "eval/teacher_kl", _small, 8),
    Shown("length", "eval/completions/mean_length", _count, 5),
    Shown("turns", "eval/completions/mean_turns", _tenths, 4),
    Shown("calls", "eval/tools/call_frequency", _tenths, 4),
    Shown("cut", "eval/completions/clipped_ratio", _share, 4),
]
BETWEEN = "  "


def texts(shown: Sequence[Shown], metrics: Metrics) -> list[str]:
    """``["reward 0.312", "length 96", …]``, of what was logged."""
    return [f"{s.label} {s.text(value)}" for s in shown if (value := metrics.get(s.key)) is not None]


def training_fields(metrics: Metrics) -> list[Shown]:
    """What a training step logged, most important first. The loss of a GRPO step says nothing and is left out."""
    shown = [s for s in [*TRAINING, SPENT, PACE, SPEED] if metrics.get(s.key) is not None]
    return [s for s in shown if not (s.key == "loss" and ("reward" in metrics or "teacher/kl" in metrics))]


def fitting(parts: Sequence[str], width: int) -> list[str]:
    """The parts, most important first, up to the first that does not fit into ``width`` columns."""
    kept: list[str] = []
    for part in parts:
        if len(BETWEEN.join([*kept, part])) > width:
            break
        kept.append(part)
    return kept


def evaluation_text(step: int, total: int, metrics: Metrics, width: int = 1000) -> str:
    """``eval at step 50/100: accuracy 0.381 [0.340, 0.424]  pass@4 0.602  length 99``, cut to what fits."""
    parts = []
    if (accuracy := metrics.get("eval/accuracy")) is not None:
        low, high = metrics.get("eval/accuracy_low"), metrics.get("eval/accuracy_high")
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        parts.append(f"accuracy {accuracy:.3f}{interval}")
    passes = [name for name in metrics if name.startswith("eval/pass@")]
    parts += texts([Shown(name.removeprefix("eval/"), name, _fixed, 5) for name in passes[-1:]], metrics)
    head = f"eval at step {step}/{total}: "
    return (head + BETWEEN.join(fitting(parts + texts(EVALUATION, metrics), width - len(head))))[:width]


class Columns:
    """Lines of training steps whose numbers stand below each other.

    What the first line shows, all show: what a later step did not log is a dash. ``step 12/100`` comes first and the
    time left next; of the rest the least important is dropped where ``width`` ends.
    """

    def __init__(self, total: int, width: int, first: Metrics) -> None:
        self.total, self.width = total, width
        taken = len(self._head(0, ""))
        self.shown: list[Shown] = []
        for shown in training_fields(first):
            taken += len(BETWEEN) + len(shown.label) + 1 + shown.width
            if taken > width:
                break
            self.shown.append(shown)

    def line(self, step: int, metrics: Metrics, time_left: str) -> str:
        parts = [self._head(step, time_left)]
        for shown in self.shown:
            value = metrics.get(shown.key)
            parts.append(f"{shown.label} {'-' if value is None else shown.text(value):>{shown.width}}")
        return BETWEEN.join(parts)[: self.width]

    def _head(self, step: int, time_left: str) -> str:
        return f"step {step:{len(str(self.total))}d}/{self.total}{BETWEEN}eta {time_left:>6}"


def duration(seconds: float) -> str:
    """``42s``, ``6m12s``, ``3h05m``, ``12d03h``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60 * 48:
        return f"{minutes // 1440}d{minutes % 1440 // 60:02d}h"
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
