"""A run on the screen: a live bar on a terminal, otherwise one plain line a step (a log file, a batch system, CI)."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from grpo.run.closed_output import lead_nowhere

log = logging.getLogger("grpo")
Metrics = Mapping[str, float | None]


class Shown(NamedTuple):
    """A metric on the screen: its label, its key, and how its value is formatted."""

    label: str
    key: str
    text: Callable[[float], str]


def _count(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.0f}%"


def _small(value: float) -> str:
    return f"{value:.3g}"


def _fixed(value: float) -> str:
    return f"{value:.3f}"


# What matters while training, most important first; what a run does not log is not shown.
TRAINING = [
    Shown("loss", "loss", _fixed),
    Shown("reward", "reward", _fixed),
    Shown("length", "completions/mean_length", _count),
    Shown("cut", "completions/clipped_ratio", _share),
    Shown("no-signal", "frac_reward_zero_std", _share),
    Shown("entropy", "entropy", _fixed),
    Shown("kl", "kl", _small),
    Shown("grad", "grad_norm", _small),
]
SPEED = Shown("tok/s", "tokens_per_second", _count)
PACE = Shown("s/step", "step_time", _small)
EVALUATION = [
    Shown("loss", "eval/loss", _fixed),
    Shown("length", "eval/completions/mean_length", _count),
    Shown("cut", "eval/completions/clipped_ratio", _share),
]
WIDTH = 118


def training_texts(metrics: Metrics) -> list[str]:
    """``["reward 0.312", "length 96", …]``. The loss of a GRPO step says nothing and is left out."""
    return _texts([shown for shown in TRAINING if not (shown.key == "loss" and "reward" in metrics)], metrics)


def evaluation_text(step: int, total: int, metrics: Metrics) -> str:
    """``eval at step 50/100: accuracy 0.381 [0.340, 0.424]  pass@4 0.602  length 99``."""
    parts = []
    if (accuracy := metrics.get("eval/accuracy")) is not None:
        low, high = metrics.get("eval/accuracy_low"), metrics.get("eval/accuracy_high")
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        parts.append(f"accuracy {accuracy:.3f}{interval}")
    passes = [name for name in metrics if name.startswith("eval/pass@")]
    parts += _texts([Shown(name.removeprefix("eval/"), name, _fixed) for name in passes[-1:]], metrics)
    return f"eval at step {step}/{total}: " + "  ".join(parts + _texts(EVALUATION, metrics))


def _texts(shown: list[Shown], metrics: Metrics) -> list[str]:
    return [f"{s.label} {s.text(value)}" for s in shown if (value := metrics.get(s.key)) is not None]


class _Eta:
    """Time left, from the recent pace of whole steps (evaluation and saving included) and the recipe's time limit."""

    def __init__(self, total: int, max_seconds: float | None, seconds: float) -> None:
        self.total = total
        self.left_seconds = None if max_seconds is None else max_seconds - seconds
        self.recent: deque[float] = deque(maxlen=20)
        self.last = time.monotonic()

    def text(self, step: int, step_time: float | None) -> str:
        now = time.monotonic()
        self.recent.append(now - self.last)
        self.last = now
        left = (self.total - step) * sum(self.recent) / len(self.recent)
        if self.left_seconds is not None:
            self.left_seconds -= step_time or 0.0
            left = min(left, max(0.0, self.left_seconds))
        return duration(left)


def duration(seconds: float) -> str:
    """``42s``, ``6m12s``, ``3h05m``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Display(Protocol):
    def log(self, step: int, metrics: Metrics) -> None: ...
    def close(self) -> None: ...


class PlainLines:
    """One line of at most WIDTH columns for each step; evaluations stand out by their mark."""

    def __init__(self, total: int, eta: _Eta) -> None:
        self.total = total
        self.eta = eta

    def log(self, step: int, metrics: Metrics) -> None:
        if _is_evaluation(metrics):
            _print(f"=== {evaluation_text(step, self.total, metrics)} ==="[:WIDTH])
            return
        time_left = self.eta.text(step, metrics.get("step_time"))
        tail = "  ".join([*_texts([SPEED, PACE], metrics), f"eta {time_left}"])
        line = f"step {step:{len(str(self.total))}d}/{self.total}"
        for text in training_texts(metrics):
            if len(line) + len(text) + len(tail) + 4 <= WIDTH:
                line += f"  {text}"
        _print(f"{line}  {tail}")

    def close(self) -> None:
        pass


def _print(line: str) -> None:
    with _unwatched():
        print(line, flush=True)


@contextmanager
def _unwatched() -> Iterator[None]:
    """What prints. A run does not end because nobody looks at it any more, or the disk under its log is full."""
    try:
        yield
    except OSError as error:
        lead_nowhere()
        why = error.strerror or type(error).__name__
        log.warning("standard output is closed (%s); the run goes on, and its metrics are in metrics.jsonl", why)


class LiveBar:
    """A bar with the latest numbers below it; evaluations scroll past above."""

    def __init__(self, total: int, step: int, eta: _Eta, console: Console) -> None:
        self.total = total
        self.eta = eta
        self.accuracy: list[str] = []  # of the last evaluation
        self.bar = Bar(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[pace]}[dim]\n{task.fields[numbers]}", justify="left"),
            console=console,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("train", total=total, completed=step, pace="", numbers="")
        self.bar.start()

    def log(self, step: int, metrics: Metrics) -> None:
        if _is_evaluation(metrics):
            text = evaluation_text(step, self.total, metrics)
            with _unwatched():
                self.bar.console.print(text, style="bold green", highlight=False, markup=False)
            if (accuracy := metrics.get("eval/accuracy")) is not None:
                self.accuracy = [f"accuracy {accuracy:.3f}"]
            return
        time_left = self.eta.text(step, metrics.get("step_time"))
        pace = "  ".join([*self.accuracy, *_texts([SPEED], metrics), f"eta {time_left}"])
        with _unwatched():
            self.bar.update(self.task, completed=step, pace=pace, numbers="  ".join(training_texts(metrics)))

    def close(self) -> None:
        with _unwatched():
            self.bar.stop()


def open_display(
    total: int, step: int, *, max_seconds: float | None = None, seconds: float = 0.0, console: Console | None = None
) -> Display:
    """The display that fits standard output. ``step`` and ``seconds`` are what an earlier start already did."""
    console = console or Console()
    eta = _Eta(total, max_seconds, seconds)
    return LiveBar(total, step, eta, console) if console.is_terminal else PlainLines(total, eta)


def _is_evaluation(metrics: Metrics) -> bool:
    return any(name.startswith("eval/") for name in metrics)
