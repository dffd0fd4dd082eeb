"""A run's metrics so far, as the rules of health read them. What they never read again is forgotten."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

Row = Mapping[str, float | None]
FIRST, LAST = 10, 100  # rows of training that are kept


@dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy with its 95% interval, and the mean reward of the steps just before it (nan: of none)."""

    step: int
    accuracy: float
    low: float
    high: float
    reward: float


class History:
    """Fed with the rows of ``metrics.jsonl`` in their order. ``steps`` counts those of training."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.steps = 0
        self.at_start: list[Row] = []
        self.recent: deque[Row] = deque(maxlen=LAST)
        self.evaluations: list[Evaluation] = []
        self.verdicts: dict[str, float] = defaultdict(float)

    def add(self, row: Row) -> None:
        if any(name.startswith("eval/") for name in row):
            self._add_evaluation(row)
            return
        self.steps += 1
        if self.steps <= FIRST:
            self.at_start.append(row)
        self.recent.append(row)
        for name, value in row.items():
            if name.startswith("verdicts/"):
                self.verdicts[name.rpartition("/")[2]] += value or 0

    def _add_evaluation(self, row: Row) -> None:
        accuracy, low, high = (row.get(f"eval/accuracy{end}") for end in ("", "_low", "_high"))
        if accuracy is not None and low is not None and high is not None:
            step = int(row.get("step") or 0)
            self.evaluations.append(Evaluation(step, accuracy, low, high, self.mean("reward")))

    def mean(self, name: str, steps: int | None = None) -> float:
        """The metric's mean over the last steps; nan unless each of them logged it. Comparisons with nan are false."""
        return _mean(list(self.recent)[-(steps or self.window) :], name, steps or self.window)

    def mean_at_start(self, name: str) -> float:
        """The same over the first steps; nan while they are among the last."""
        return _mean(self.at_start[: self.window], name, self.window) if self.steps >= 2 * self.window else math.nan

    def usual(self, name: str) -> float:
        """The median over the steps before the last; nan with fewer than two windows of them."""
        values = [value for row in list(self.recent)[:-1] if (value := row.get(name)) is not None]
        return median(values) if len(values) >= 2 * self.window else math.nan


def _mean(rows: list[Row], name: str, count: int) -> float:
    values = [value for row in rows if (value := row.get(name)) is not None]
    return fmean(values) if len(values) == count else math.nan
