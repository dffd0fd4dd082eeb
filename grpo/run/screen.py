"""A run on the screen: a live bar on a terminal, otherwise plain lines (a log file, a batch system, CI).

``fields.py`` says which numbers are shown, and which of them fit.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from grpo.errors import printable
from grpo.run.closed_output import lead_nowhere
from grpo.run.fields import (
    BETWEEN,
    COST,
    SPEED,
    Columns,
    Metrics,
    dollars,
    duration,
    evaluation_text,
    fitting,
    texts,
    training_fields,
)

log = logging.getLogger("grpo")
WIDTH = 118  # of a plain line
BAR = 24  # columns of the bar, at most; a fifth of the terminal, and at least ten
PERMANENT_LINES = 20  # that a short run leaves on a terminal; a long one leaves a line every 10 steps
SECONDS_OF_SILENCE = 30.0  # after which a plain log tells how far a phase is

Tell = Callable[[int], None]


class Eta:
    """Time left, from the recent pace of whole steps (evaluation and saving included) and the recipe's time limit."""

    def __init__(self, total: int, max_seconds: float | None, seconds: float) -> None:
        self.total = total
        self.left_training = None if max_seconds is None else max_seconds - seconds
        self.recent: deque[float] = deque(maxlen=20)
        self.last = time.monotonic()
        self.seconds: float | None = None

    def see(self, step: int, step_time: float | None) -> None:
        now = time.monotonic()
        self.recent.append(now - self.last)
        self.last = now
        self.seconds = (self.total - step) * sum(self.recent) / len(self.recent)
        if self.left_training is not None:
            self.left_training -= step_time or 0.0
            self.seconds = min(self.seconds, max(0.0, self.left_training))

    def text(self) -> str:
        return "?" if self.seconds is None else duration(self.seconds)


class Display(Protocol):
    def log(self, step: int, metrics: Metrics) -> None: ...
    def phase(self, text: str, total: int | None) -> contextlib.AbstractContextManager[Tell]: ...
    def close(self) -> None: ...


class PlainLines:
    """One line of at most WIDTH columns for each step, in fixed columns; evaluations stand out by their mark."""

    def __init__(self, total: int, eta: Eta) -> None:
        self.total = total
        self.eta = eta
        self.columns: Columns | None = None

    def log(self, step: int, metrics: Metrics) -> None:
        if _is_evaluation(metrics):
            say(f"=== {evaluation_text(step, self.total, metrics, WIDTH - 8)} ===")
            return
        self.eta.see(step, metrics.get("step_time"))
        self.columns = self.columns or Columns(self.total, WIDTH, metrics)
        say(self.columns.line(step, metrics, self.eta.text()))

    @contextlib.contextmanager
    def phase(self, text: str, total: int | None) -> Iterator[Tell]:
        """Says nothing of a phase that is short."""
        said = time.monotonic()

        def tell(done: int) -> None:
            nonlocal said
            if time.monotonic() - said >= SECONDS_OF_SILENCE:
                said = time.monotonic()
                say(_phase_text(text, done, total))

        yield tell

    def close(self) -> None:
        pass


class LiveBar:
    """Two lines that never wrap: the step count, a bar and what the run is doing, and the latest numbers. What does not
    fit into the terminal's width is left out, the least important first. Evaluations, and a line every few steps,
    stay above."""

    def __init__(self, total: int, step: int, eta: Eta, console: Console, price: float | None = None) -> None:
        self.total, self.step, self.eta, self.console, self.price = total, step, eta, console, price
        self.every = max(1, min(10, total // PERMANENT_LINES))
        self.metrics: Metrics = {}
        self.accuracy: list[str] = []  # of the last evaluation
        self.doing = ""
        self.columns: Columns | None = None
        self.live = Live(console=console, get_renderable=self._lines, refresh_per_second=4)
        self.live.start()

    def log(self, step: int, metrics: Metrics) -> None:
        if _is_evaluation(metrics):
            text = evaluation_text(step, self.total, metrics, self.console.width)
            self._keep(text, "bold green")
            if (accuracy := metrics.get("eval/accuracy")) is not None:
                self.accuracy = [f"accuracy {accuracy:.3f}"]
            return
        self.eta.see(step, metrics.get("step_time"))
        self.step, self.metrics = step, metrics
        if step % self.every == 0 or step == self.total:
            if self.columns is None or self.columns.width != self.console.width:
                self.columns = Columns(self.total, self.console.width, metrics)
            self._keep(self.columns.line(step, metrics, self.eta.text()), "")

    @contextlib.contextmanager
    def phase(self, text: str, total: int | None) -> Iterator[Tell]:
        def tell(done: int) -> None:
            self.doing = _phase_text(text, done, total)

        tell(0)
        try:
            yield tell
        finally:
            self.doing = ""

    def close(self) -> None:
        with unwatched():
            self.live.stop()

    def _keep(self, line: str, style: str) -> None:
        with unwatched():
            self.console.print(Text(line, style=style, no_wrap=True, overflow="crop"))

    def _lines(self) -> Text:
        width = self.console.width
        count = f"step {self.step}/{self.total}"
        bar = max(0, min(BAR, max(10, width // 5), width - len(count) - 1))
        room = width - len(count) - 1 - bar - len(BETWEEN)
        rest = [f"eta {self.eta.text()}", *self._cost(), *self.accuracy, *texts([SPEED], self.metrics)]
        parts = [(self.doing, "cyan"), (self._health(room, rest[0]), "bold red"), *((text, "") for text in rest)]
        parts = [part for part in parts if part[0]]
        kept = fitting([text for text, _ in parts], room)
        lines = Text(count, style="bold", no_wrap=True, overflow="crop", end="")
        lines.append(" ").append_text(self._bar(bar))
        for text, style in parts[: len(kept)]:
            lines.append(BETWEEN).append(text, style=style or "not bold")
        shown = [s for s in training_fields(self.metrics) if s.key not in (COST, SPEED.key)]
        numbers = BETWEEN.join(fitting(texts(shown, self.metrics), width))
        return lines.append(f"\n{numbers}", style="not bold")

    def _health(self, room: int, eta: str) -> str:
        """The rules that hold: by name, or their number where with names the time left would not fit beside them."""
        names = sorted(name.removeprefix("health/") for name in self.metrics if name.startswith("health/"))
        if not names:
            return ""
        text = " ".join(["health:", *names])
        beside = [part for part in (self.doing, text, eta) if part]
        return text if fitting(beside, room) == beside else f"health: {len(names)} rule{'s' * (len(names) > 1)}"

    def _bar(self, width: int) -> Text:
        full, empty = ("━", "─") if (self.console.encoding or "").startswith("utf") else ("#", ".")
        done = width * min(self.step, self.total) // max(1, self.total)
        return Text(full * done, style="not bold green").append(empty * (width - done), style="not bold dim")

    def _cost(self) -> list[str]:
        """``$0.42 of $3.10`` and ``81% in steps``: by wall-clock time, so far and at the end as it goes now."""
        spent = self.metrics.get(COST)
        if spent is None or self.price is None or self.eta.seconds is None:
            return []
        whole = spent + self.price * self.eta.seconds / 3600
        share = (self.metrics.get("cost_usd") or 0.0) / spent if spent else 0.0
        if whole < 0.01:  # nobody cares
            return []
        return [f"{dollars(spent)} of {dollars(whole)}"] + ([f"{share:.0%} in steps"] if share else [])


def open_display(
    total: int,
    step: int,
    *,
    max_seconds: float | None = None,
    seconds: float = 0.0,
    price: float | None = None,
    console: Console | None = None,
) -> Display:
    """The display that fits standard output. ``step`` and ``seconds`` are what an earlier start already did; ``price``
    is in US dollars an hour."""
    console = console or Console()
    eta = Eta(total, max_seconds, seconds)
    return LiveBar(total, step, eta, console, price) if console.is_terminal else PlainLines(total, eta)


@contextlib.contextmanager
def working(text: str, *, shown: bool = True) -> Iterator[None]:
    """Say what takes its time before or after the steps: a line on a terminal while it lasts, a line that stays
    elsewhere. Only the first process shows it."""
    console = Console()
    if shown and console.is_terminal:
        with console.status(Text(printable(text), no_wrap=True, overflow="ellipsis"), spinner="line"):
            yield
        return
    if shown:
        say(text)
    yield


def say(line: str) -> None:
    """Print a line, if somebody looks."""
    with unwatched():
        print(printable(line), flush=True)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """What prints. A run does not end because nobody looks at it any more, or the disk under its log is full."""
    try:
        yield
    except OSError as error:
        lead_nowhere()
        why = error.strerror or type(error).__name__
        log.warning("standard output is closed (%s); the run goes on, and its metrics are in metrics.jsonl", why)


def _phase_text(text: str, done: int, total: int | None) -> str:
    return text if total is None else f"{text} {done}/{total}"


def _is_evaluation(metrics: Metrics) -> bool:
    return any(name.startswith("eval/") for name in metrics)
