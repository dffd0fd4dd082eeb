"""A run's metrics beside what its recipe expects of them (``expect``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo.health.history import Row


@dataclass(frozen=True)
class Judgement:
    """A band, the step that it was held against, and the metric there."""

    step: int
    metric: str
    value: float
    low: float
    high: float
    source: str

    @property
    def on_track(self) -> bool:
        return self.low <= self.value <= self.high

    def text(self) -> str:
        band = f"expected {self.low:g} to {self.high:g} ({self.source})"
        return f"{'on' if self.on_track else 'off'} track at step {self.step}: {self.metric} {self.value:.3f}, {band}"


class Bands:
    """Fed with the rows of metrics.jsonl in their order; each band is judged once."""

    def __init__(self, expected: Iterable[Mapping[str, Any]]) -> None:
        self.waiting = sorted(expected, key=lambda band: band["step"])
        self.judged: list[Judgement] = []

    def see(self, row: Row) -> list[Judgement]:
        """The judgements that this row makes possible."""
        step = int(row.get("step") or 0)
        found = [
            Judgement(step, band["metric"], value, band["low"], band["high"], band["source"])
            for band in self.waiting
            if band["step"] <= step and (value := row.get(band["metric"])) is not None
        ]
        self.waiting = [band for band in self.waiting if band["step"] > step or row.get(band["metric"]) is None]
        self.judged += found
        return found
