"""How many completions of a step could not be scored, and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from grpo.errors import RunError

logger = logging.getLogger(__name__)


class Failures:
    """The completions of a step that could not be scored, by what failed (``who`` and did what) and cause."""

    def __init__(self, who: Sequence[str], step: int, max_failure_rate: float) -> None:
        self.completions = [0] * len(who)  # of the whole step, that each of them scores
        self._who = who
        self._step = step
        self._max_failure_rate = max_failure_rate
        self._causes: list[Counter[str]] = [Counter() for _ in who]
        self._first = [""] * len(who)

    def add(self, function: int, cause: str, completions: int, message: str) -> None:
        """Count a failure. Raises RunError where they are more than ``scoring.max_failure_rate`` allows."""
        self._causes[function][cause] += completions
        self._first[function] = self._first[function] or message.strip()
        if sum(self._causes[function].values()) > self._max_failure_rate * self.completions[function]:
            raise RunError(
                f"{self._counted(function)}, more than scoring.max_failure_rate = {self._max_failure_rate:g} allows. "
                f"`grpo audit RECIPE` tries it without a model. The first: {self._first[function]}"
            )

    def warn(self, told: set[int]) -> None:
        """Log a line for each function that failed, with its first failure unless ``told`` has the function already."""
        for function, causes in enumerate(self._causes):
            if causes:
                first = "" if function in told else f". The first: {self._first[function]}"
                logger.warning("%s%s", self._counted(function), first)
                told.add(function)

    def _counted(self, function: int) -> str:
        causes = self._causes[function]
        counts = ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
        return (
            f"step {self._step}: {self._who[function]} {sum(causes.values())} of "
            f"{self.completions[function]} completions ({counts})"
        )
