"""The findings of ``grpo audit`` about one reward, and the report on them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from grpo.audit.cases import GOLD, WRONG, Case
from grpo.audit.standard import Standard

SHOWN = 5  # rows and cheats that are spelled out


@dataclass
class Paid:
    """A cheat that was paid: in how many rows, and the place, value and text of the first."""

    rows: int
    place: str
    value: float
    text: str


@dataclass
class Outcome:
    """One reward over all rows of an audit; ``add`` takes them one by one."""

    name: str
    source: str
    standard: Standard
    form: str
    rows: int
    kind: str
    gold_missing: int = 0
    gold_failed: list[list[str]] = field(default_factory=list)  # place, value, text, why
    cheats: int = 0
    cheat_names: set[str] = field(default_factory=set)
    paid: dict[str, Paid] = field(default_factory=dict)
    unscored: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    calls: list[tuple[float, int]] = field(default_factory=list)  # seconds, completions
    gold_values: list[float] = field(default_factory=list)
    wrong_values: list[float] = field(default_factory=list)
    above_wrong: int = 0
    lowest: float = float("inf")
    highest: float = float("-inf")
    executed: int = 0
    first_failure: str = ""

    def gold_fails(self, value: float | None) -> bool:
        return self.standard.judges is not None and (value is None or value < self.standard.gold_at_least)

    def add(
        self, place: str, tried: Sequence[Case], values: Sequence[float | None], verdicts: Counter[str], seconds: float
    ) -> None:
        by_name = {case.name: value for case, value in zip(tried, values, strict=True)}
        self.calls.append((seconds, len(tried)))
        self.verdicts += verdicts
        numbers = [value for value in values if value is not None]
        self.lowest, self.highest = min([self.lowest, *numbers]), max([self.highest, *numbers])
        gold, wrong = by_name.get(GOLD), by_name.get(WRONG)
        if GOLD not in by_name:
            self.gold_missing += 1
        elif self.gold_fails(gold):
            text = next(case.text for case in tried if case.name == GOLD)
            self.gold_failed.append([place, "no reward" if gold is None else f"{gold:g}", text, ""])
        if gold is not None:
            self.gold_values.append(gold)
        if wrong is not None:
            self.wrong_values.append(wrong)
        self.above_wrong += gold is not None and wrong is not None and gold > wrong
        for case, value in zip(tried, values, strict=True):
            if case.name == GOLD or self.standard.judges not in case.against:
                continue
            self.cheats += 1
            self.cheat_names.add(case.name)
            if value is None:
                self.unscored[case.name] += 1
            elif self.standard.paid_cheat(case.name, value, gold):
                paid = self.paid.setdefault(case.name, Paid(0, place, value, case.text))
                paid.rows += 1

    def explain_gold(self, why: str) -> None:
        """Why the last right completion was not paid."""
        self.gold_failed[-1][3] = why

    def unsolvable(self, place: str) -> None:
        """The last row has no right answer at all, so nobody can be paid for it."""
        self.gold_missing -= 1
        self.gold_failed.append(
            [place, "unsolvable", "", "no expression reaches the target, or its columns are broken"]
        )

    @property
    def tells_right_from_wrong(self) -> bool:
        return self.standard.judges == "answer" and (self.above_wrong > 0 or self.gold_missing == self.rows)

    @property
    def judged(self) -> bool:
        """A function of the user's is judged if it pays the right answer more than a wrong one: else it is shaping."""
        return self.standard.judges is not None and (not self.standard.users_own or self.above_wrong > 0)


def section(where: str, outcome: Outcome) -> tuple[str, list[str]]:
    """The report on one reward, and a line for each thing that is wrong with it."""
    title = f"{where} {outcome.name}"
    lines, findings = [f"{title}  ({outcome.source})"], []
    for label, found, finding in (_gold(outcome), _cheats(outcome)):
        lines += [f"  {label:<9} {line}" for line in found[:1]]
        lines += [*(f"    {line}" for line in found[1:])]
        findings += [f"{title}: {finding}"] if finding else []
    if outcome.executed:
        finding = f"it ran the text of a completion as a program ({_rows(outcome.executed)})"
        lines.append(f"  DANGER    {finding}")
        findings.append(f"{title}: {finding}")
    if outcome.verdicts:
        lines.append("  verdicts  " + ", ".join(f"{name} {n}" for name, n in outcome.verdicts.most_common()))
    lines.append(f"  time      {_times(outcome.calls)}")
    if outcome.first_failure:
        lines += ["  failure   the first call that failed:"]
        lines += [f"    {line}" for line in outcome.first_failure.strip().splitlines()[-12:]]
    return "\n".join(lines), findings


def _gold(outcome: Outcome) -> tuple[str, list[str], str]:
    """Label, lines, and what is wrong ("" for nothing)."""
    known, least = outcome.rows - outcome.gold_missing, f"{outcome.standard.gold_at_least:g}"
    missing = f"; {outcome.gold_missing} rows do not tell their right answer" if outcome.gold_missing else ""
    if not known:
        return "gold", ["not available: no row tells its right answer in a column the audit knows"], ""
    if outcome.standard.judges is None:
        return "gold", [f"{_range(outcome.gold_values)}; it shapes and is not judged{missing}"], ""
    if outcome.standard.users_own and not outcome.above_wrong:
        return _undiscerning(outcome)
    failed = len(outcome.gold_failed)
    lines = [f"{known - failed} of {known} rows pay at least {least} for the right answer, as {outcome.form}{missing}"]
    for place, value, text, why in outcome.gold_failed[:SHOWN]:
        lines.append(f"FAILS {place}: {value}{f' ({why})' if why else ''}{f' for {_brief(text)}' if text else ''}")
    if failed > SHOWN:
        lines.append(f"and {failed - SHOWN} more rows")
    return "gold", lines, f"the right answer is not paid {least} in {failed} of {known} rows" if failed else ""


def _undiscerning(outcome: Outcome) -> tuple[str, list[str], str]:
    """A function that paid no right answer more than a wrong one: shaping, or its form is not one that was tried."""
    told = _range(outcome.gold_values)
    if max(outcome.gold_values, default=0.0) >= 1 or outcome.lowest < 0 >= outcome.highest:
        return "gold", [f"{told}, and wrong ones no less: taken for shaping, not judged"], ""
    told += ": no form that was tried is worth more than a wrong answer; give its form by --gold, or say shaping: true"
    return "gold", [told], "no form of the right answer scores 1"


def _cheats(outcome: Outcome) -> tuple[str, list[str], str]:
    if not outcome.judged:
        return "cheats", [], ""
    lines = [f"{outcome.cheats} completions of {len(outcome.cheat_names)} kinds, {len(outcome.paid)} kinds paid"]
    for name, paid in sorted(outcome.paid.items(), key=lambda item: -item[1].rows):
        lines.append(f"PAID {paid.value:g} for {name} ({_rows(paid.rows)}), first {paid.place}: {_brief(paid.text)}")
    for name, rows in outcome.unscored.most_common():
        lines.append(f"not scored: {name} ({_rows(rows)})")
    return "cheats", lines, f"it pays for {'; '.join(sorted(outcome.paid))}" if outcome.paid else ""


def _rows(n: int) -> str:
    return f"{n} row" if n == 1 else f"{n} rows"


def _range(values: list[float]) -> str:
    return f"right answers get {min(values):g} to {max(values):g}" if values else "right answers get no reward"


def _times(calls: list[tuple[float, int]]) -> str:
    seconds = sorted(spent for spent, _ in calls)
    per_completion = sum(seconds) / max(1, sum(n for _, n in calls))
    size = round(statistics.median(n for _, n in calls)) if calls else 0
    p95 = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))] if seconds else 0.0
    median = statistics.median(seconds) if seconds else 0.0
    return (
        f"{1e3 * median:.2f} ms a call of {size} completions (median; p95 {1e3 * p95:.2f} ms), "
        f"{1e3 * per_completion:.3f} ms a completion"
    )


def _brief(text: str) -> str:
    text = repr(text)
    return text if len(text) <= 140 else f"{text[:90]} ... {text[-40:]}"
