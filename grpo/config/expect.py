"""The recipe's list ``expect``: what a metric should be at a step, and where that is known from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from grpo.config.base import Finite, NonEmpty, NonNegativeInt, Problem, Section, refuse


class ExpectConfig(Section):
    metric: NonEmpty
    """Its name in metrics.jsonl: `eval/accuracy`, `completions/mean_length`."""
    step: NonNegativeInt
    """The step: the first that logs the metric from here on."""
    low: Finite
    """The least that is expected."""
    high: Finite
    """The most that is expected."""
    source: Annotated[str, Field(min_length=1)]
    """Where the band is from: seeds, a page of results."""

    @model_validator(mode="after")
    def _is_a_band(self) -> ExpectConfig:
        if self.low > self.high:
            refuse([Problem(("low", "high"), f"low ({self.low:g}) is above high ({self.high:g})")])
        return self
