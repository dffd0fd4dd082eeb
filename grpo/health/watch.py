"""Which rules hold after each step: when they begin, when they end, and what is to be done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo.health.history import History, Row, rolled_back_to
from grpo.health.rules import RULES, STEPS, Rule

OFF, WARN, ROLLBACK, STOP = "off", "warn", "rollback", "stop"


@dataclass(frozen=True)
class Change:
    """A rule that began to hold (``statement`` says what it sees) or ended (it is None), after ``step``."""

    step: int
    rule: Rule
    statement: str | None

    def text(self) -> str:
        if self.statement is None:
            return f"health: {self.rule.name} is over"
        return f"health: {self.rule.name}: {self.statement}. Perhaps {self.rule.cause}. {sentence(self.rule.cure)}."


@dataclass(frozen=True)
class Demand:
    """What the recipe wants done (STOP or ROLLBACK) where a rule holds, the rule's name and what it sees."""

    action: str
    rule: str
    statement: str


class Watch:
    """Fed with the rows of metrics.jsonl in their order, those of a run that is resumed first.

    ``actions`` says of each rule what it does; a rule that is not in it warns.
    """

    def __init__(self, actions: Mapping[str, Any] | None = None) -> None:
        self.actions = actions or {}
        self.rules = [rule for rule in RULES if self.actions.get(rule.name, WARN) != OFF]
        self.history = History(STEPS)
        self.holding: dict[str, str] = {}

    def see(self, row: Row) -> list[Change]:
        """What begins and ends with this row. With a rollback's, every rule ends: its window begins anew."""
        self.history.add(row)
        step, changes = int(row.get("step") or 0), []
        if rolled_back_to(row) is not None:
            changes = [Change(step, rule, None) for rule in self.rules if rule.name in self.holding]
            self.holding.clear()
            return changes
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

    def demand(self) -> Demand | None:
        """What is to be done now, of the first rule that holds and asks for something: a stop before a rollback."""
        asked = [Demand(str(self.actions.get(name)), name, text) for name, text in self.holding.items()]
        return next((one for action in (STOP, ROLLBACK) for one in asked if one.action == action), None)


def sentence(text: str) -> str:
    """A statement that begins with a capital letter, unless a key of the recipe does."""
    return text if "." in text.split(maxsplit=1)[0] else text[:1].upper() + text[1:]
