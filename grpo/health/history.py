"""A run's metrics so far, as the rules of health read them. What they never read again is forgotten."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

Row = Mapping[str, float | None]
FIRST, LAST = 10, 100  # rows of training that are kept
ROLLED_BACK = "rollback/to_step"  # in the row of a rollback, and in no other


@dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy with its 95% interval, and the mean reward of the steps just before it (nan: of none)."""

    step: int
    accuracy: float
    low: float
    high: float
    reward: float


class History:
    """Fed with the rows of ``metrics.jsonl`` in their order. ``steps`` counts those of training, since the start or
    since the run last went back to its best model."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.steps = 0
        self.at_start: list[Row] = []
        self.recent: deque[Row] = deque(maxlen=LAST)
        self.evaluations: list[Evaluation] = []
        self.verdicts: dict[str, Counter[str]] = defaultdict(Counter)
        """How often, since then, each reward function gave each verdict."""

    def add(self, row: Row) -> None:
        if (to := rolled_back_to(row)) is not None:
            self._roll_back(to)
            return
        if any(name.startswith("eval/") for name in row):
            self._add_evaluation(row)
            return
        self.steps += 1
        if len(self.at_start) < FIRST:
            self.at_start.append(row)
        self.recent.append(row)
        for name, value in row.items():
            if name.startswith("verdicts/"):
                _, function, verdict = name.split("/", 2)
                self.verdicts[function][verdict] += int(value or 0)

    def _add_evaluation(self, row: Row) -> None:
        accuracy, low, high = (row.get(f"eval/accuracy{end}") for end in ("", "_low", "_high"))
        if accuracy is not None and low is not None and high is not None:
            step = int(row.get("step") or 0)
            self.evaluations.append(Evaluation(step, accuracy, low, high, self.mean("reward")))

    def _roll_back(self, step: int) -> None:
        """What the run has gone back from says nothing of the model that it goes on with. The start stays."""
        self.steps = 0
        self.recent.clear()
        self.verdicts.clear()
        self.evaluations = [one for one in self.evaluations if one.step <= step]

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


def rolled_back_to(row: Row) -> int | None:
    """The step of the model that the run went back to; None in a row that is of no rollback."""
    to = row.get(ROLLED_BACK)
    return None if to is None else int(to)


def _mean(rows: list[Row], name: str, count: int) -> float:
    values = [value for row in rows if (value := row.get(name)) is not None]
    return fmean(values) if len(values) == count else math.nan
