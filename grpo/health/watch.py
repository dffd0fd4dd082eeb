"""Which rules hold after each step: when they begin, when they end, and whether the run is to stop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from grpo.health.history import History, Row
from grpo.health.rules import RULES, STEPS, Rule

OFF, WARN, STOP = "off", "warn", "stop"


@dataclass(frozen=True)
class Change:
    """A rule that began to hold (``statement`` says what it sees) or ended (it is None), after ``step``."""

    step: int
    rule: Rule
    statement: str | None

    def text(self) -> str:
        if self.statement is None:
            return f"health: {self.rule.name} is over"
        return f"health: {self.rule.name}: {self.statement}. Perhaps {self.rule.cause}. {_sentence(self.rule.cure)}."


class Watch:
    """Fed with the rows of metrics.jsonl in their order, those of a run that is resumed first.

    ``actions`` says of each rule what it does; a rule that is not in it warns.
    """

    def __init__(self, actions: Mapping[str, str] | None = None) -> None:
        given = actions or {}
        self.rules = [rule for rule in RULES if given.get(rule.name, WARN) != OFF]
        self.stops = {rule.name for rule in RULES if given.get(rule.name) == STOP}
        self.history = History(STEPS)
        self.holding: dict[str, str] = {}

    def see(self, row: Row) -> list[Change]:
        """What begins and ends with this row."""
        self.history.add(row)
        step, changes = int(row.get("step") or 0), []
        for rule in self.rules:
            statement = rule.sees(self.history)
            if (statement is not None) != (rule.name in self.holding):
                changes.append(Change(step, rule, statement))
            if statement is None:
                self.holding.pop(rule.name, None)
            else:
                self.holding[rule.name] = statement
        return changes

    def see_all(self, rows: Iterable[Row]) -> list[Change]:
        return [change for row in rows for change in self.see(row)]

    def metrics(self) -> dict[str, float]:
        """``health/RULE`` is 1 while a rule holds."""
        return {f"health/{name}": 1.0 for name in self.holding}

    def reason_to_stop(self) -> str | None:
        """What the first rule that is to stop the run sees, or None."""
        return next((f"{name}: {text}" for name, text in self.holding.items() if name in self.stops), None)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
