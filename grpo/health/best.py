"""The best evaluation of a run so far, by one metric."""

from __future__ import annotations

from grpo.errors import RunError
from grpo.health.history import Row, rolled_back_to


class Best:
    """Fed with the rows of metrics.jsonl in their order. ``metric`` None keeps nothing.

    The largest value is the best, or the smallest where the metric's name ends in ``loss``. ``stale`` is how many
    evaluations in a row were no better, since the start or since the run went back to the best.
    """

    def __init__(self, metric: str | None) -> None:
        self.metric = metric
        self.sign = -1.0 if (metric or "").endswith("loss") else 1.0
        self.value: float | None = None
        self.step = 0
        self.stale = 0
        self.rollbacks = 0

    def see(self, row: Row) -> None:
        """Raises RunError where an evaluation does not have the metric."""
        if rolled_back_to(row) is not None:
            self.stale = 0
            self.rollbacks += 1
        if self.metric is None or not any(name.startswith("eval/") for name in row):
            return
        if self.metric not in row:
            names = ", ".join(name for name in row if name.startswith("eval/"))
            raise RunError(f"training.save_best: {self.metric} is not among the metrics of evaluation ({names})")
        value = row[self.metric]
        if value is not None and (self.value is None or self.sign * value > self.sign * self.value):
            self.value, self.step, self.stale = value, int(row.get("step") or 0), 0
        else:
            self.stale += 1
