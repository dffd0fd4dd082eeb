"""What happened in a run, in words: the gain with its interval, how it ended, and the rules of health that held."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from grpo.evaluation.statistics import Paired, paired_test
from grpo.health.bands import Bands
from grpo.health.history import ROLLED_BACK
from grpo.health.rules import RULES
from grpo.health.watch import Change, Watch, sentence
from grpo.metrics import question_of
from grpo.report.attempts import ends
from grpo.run.read import RunRecord, mapping

Tone = Literal["good", "bad", "plain"]
FEWEST = 10  # prompts that changed sides, for the normal interval of paired differences


@dataclass(frozen=True)
class Finding:
    """A sentence, after a name in bold if it has one."""

    tone: Tone
    text: str
    name: str = ""


@dataclass(frozen=True)
class Gain:
    """Accuracy at the last evaluation less that at the first, with a 95% interval; ``how`` says where that is from."""

    before: float
    after: float
    low: float
    high: float
    how: str

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def tone(self) -> Tone:
        return "good" if self.low > 0 else "bad" if self.high < 0 else "plain"


def gain(run: RunRecord) -> Gain | None:
    """The gain in held-out accuracy; None where it was not evaluated twice."""
    _, accuracy = run.series("eval/accuracy")
    if len(accuracy) < 2:
        return None
    before, after = float(accuracy[0]), float(accuracy[-1])
    if found := _paired(run):
        low, high = (after - before + end - found.difference for end in (found.low, found.high))
        return Gain(before, after, low, high, "the same tasks, paired")
    lows, highs = (run.series(f"eval/accuracy_{end}")[1] for end in ("low", "high"))
    if not len(lows) == len(highs) == len(accuracy):
        return Gain(before, after, -1.0, 1.0, "no interval was logged")
    # Newcombe (1998), method 10: the intervals of two proportions, squared and added. Wide where they are correlated.
    low = after - before - math.hypot(after - lows[-1], highs[0] - before)
    high = after - before + math.hypot(highs[-1] - after, before - lows[0])
    return Gain(before, after, float(low), float(high), "from the two intervals")


def _paired(run: RunRecord) -> Paired | None:
    """The last evaluation less the first on the held-out prompts of both; None with few that changed."""
    first, last = ends(run)
    prompts = [p for p in first if first[p].scored and last[p].scored]
    before, after = ([evaluation[p].share for p in prompts] for evaluation in (first, last))
    if sum(a != b for a, b in zip(before, after, strict=True)) < FEWEST:
        return None
    found = paired_test(before, after, [question_of(first[p].row) for p in prompts])
    return found if found.questions > 1 else None


def judgement(run: RunRecord, *, running: bool = False) -> list[Finding]:
    """Findings, the most important first."""
    return [*_of_accuracy(run), *_of_bands(run), *_of_end(run, running), *_of_rollbacks(run), *_of_health(run)]


def _of_accuracy(run: RunRecord) -> Iterator[Finding]:
    found = gain(run)
    if found is None:
        if run.setting("stage") != "sft" and not run.setting("teacher"):
            yield Finding("plain", "It was not evaluated before and after, so nothing is known of what it has learned.")
        return
    ends = f"from {found.before:.3f} to {found.after:.3f}"
    if found.tone == "good":
        yield Finding("good", f"Held-out accuracy rose {ends}, by more than chance.")
    elif found.tone == "bad":
        yield Finding("bad", f"Held-out accuracy fell {ends}, by more than chance.")
    else:
        yield Finding("plain", f"Held-out accuracy went {ends}, which may be chance.")
    steps, accuracy = run.series("eval/accuracy")
    best = int(accuracy.argmax())
    _, lows = run.series("eval/accuracy_low")
    _, highs = run.series("eval/accuracy_high")
    if len(lows) == len(highs) == len(accuracy) and best > 0 and highs[-1] < lows[best]:
        yield Finding("bad", f"It was best at step {steps[best]:.0f}, with {accuracy[best]:.3f}, and has lost since.")


def expected(run: RunRecord) -> list[dict[str, Any]]:
    """The bands of the recipe (``expect``), those that are whole."""
    bands = run.setting("expect", [])
    return [
        band for band in bands if isinstance(band, dict) and {"metric", "source"} <= band.keys() and _has_ends(band)
    ]


def _has_ends(band: dict[str, Any]) -> bool:
    return all(isinstance(band.get(key), int | float) for key in ("step", "low", "high"))


def _of_bands(run: RunRecord) -> Iterator[Finding]:
    """What the recipe expects, and what came."""
    bands = Bands(expected(run))
    for row in run.rows():
        for judged in bands.see(row):
            name, _, text = judged.text().partition(" at ")
            yield Finding("good" if judged.on_track else "bad", f"at {text}.", name)


def _of_end(run: RunRecord, running: bool) -> Iterator[Finding]:
    total = run.number("training.max_steps")
    if running:
        yield Finding("plain", f"It is at step {run.steps}{f' of {total:.0f}' if total else ''}, and going on.")
    elif total and run.steps < total and not (run.folder / "final").exists():
        yield Finding("plain", f"It ended, or is, at step {run.steps} of {total:.0f}, and has no final model.")


def _of_rollbacks(run: RunRecord) -> Iterator[Finding]:
    for row in run.rollbacks:
        rules = [rule.name for rule in RULES if row.get(f"rollback/{rule.name}")]
        text = f"After step {row['step']} it went back to its best model, of step {row[ROLLED_BACK]:.0f}"
        why = f"because of {' and '.join(rules) or 'a rule of health'} (a dashed line in the curves)"
        yield Finding("bad", f"{text}, {why}.", "rollback")


def _of_health(run: RunRecord) -> Iterator[Finding]:
    actions = {name: action for name, action in mapping(run.setting("health")).items() if isinstance(action, str)}
    spans = health_spans(run, actions)
    for changes in spans.values():
        last = changes[-1][0]
        when = ", ".join(_span(begun.step, None if ended is None else ended.step) for begun, ended in changes[:5])
        more = f" and {len(changes) - 5} times more" if len(changes) > 5 else ""
        text = f"{when}{more}: {last.statement}. Perhaps {last.rule.cause}. {sentence(last.rule.cure)}."
        yield Finding("bad", text, last.rule.name)
    if not spans:
        yield Finding("good", "Health: no rule saw anything wrong.")


def health_spans(run: RunRecord, actions: dict[str, str]) -> dict[str, list[tuple[Change, Change | None]]]:
    """By rule, when it began to hold and when that ended (None: it held to the end)."""
    spans: dict[str, list[tuple[Change, Change | None]]] = defaultdict(list)
    for change in Watch(actions).see_all(run.rows()):
        if change.statement is None:
            spans[change.rule.name][-1] = (spans[change.rule.name][-1][0], change)
        else:
            spans[change.rule.name].append((change, None))
    return dict(spans)


def _span(begun: int, ended: int | None) -> str:
    if ended is None:
        return f"from step {begun} to the end"
    return f"step {begun}" if ended - begun <= 1 else f"steps {begun} to {ended - 1}"
