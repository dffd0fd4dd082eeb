"""Whether a search trace reads well, whatever its answer is worth: the form in which ``data/traces.py`` writes.

A reader can follow a trace that says nothing false, tries nothing twice, stops when it has found the target, and says
nothing beside its attempts and its answer. A trace may give up too early and answer wrongly and still read well; one
that ends in the right answer after two repeated attempts and a wrong sum does not. So form and accuracy are measured
apart. In a recipe it is a reward without weight, which is measured and not learned from:

    rewards: [{name: countdown}, {path: data.trace_form:form, weight: 0, shaping: true}]
"""

from __future__ import annotations

import operator
import re
from typing import Any

STEP = r"\d+ [-+*/] \d+ = \d+"
TRACE = re.compile(
    rf"<think>(?P<attempts>( {STEP}( , {STEP})* \? \d+ (yes|<|>))+) </think> <answer>( (\d+|[-+*/()]))+ </answer>"
)
ATTEMPT = re.compile(rf"(?P<steps>{STEP}(?: , {STEP})*) \? (?P<target>\d+) (?P<verdict>yes|<|>)")
CUT, SHAPE, ARITHMETIC, VERDICT, REPEATED, AFTER = FAULTS = (
    "cut off",  # the longest length came first
    "other text",  # something beside attempts in the thinking and one expression in the answer
    "false step",  # 6 + 3 = 8
    "false verdict",  # 27 < for a result above 27, or a yes that is none
    "repeated attempt",  # the same steps again
    "after yes",  # an attempt after the target was found
)
TRUE_OF = {"yes": operator.eq, "<": operator.lt, ">": operator.gt}


def faults(completion: str, status: str = "stop") -> list[str]:
    """What a reader would stumble over, of ``FAULTS`` in their order; nothing for a trace that reads well.

    ``status`` is how the completion ended: ``stop``, or ``length`` for one that was cut off. Never raises on any text.
    A text that is not a trace throughout has no other fault told, but for attempts that are made out in it all the
    same.
    """
    text = " ".join(completion.split())
    attempts = [match.group("steps", "target", "verdict") for match in ATTEMPT.finditer(text)]
    steps = [attempt[0] for attempt in attempts]
    found = {
        CUT: status != "stop",
        SHAPE: TRACE.fullmatch(text) is None,
        ARITHMETIC: not all(_is_true(step) for attempt in steps for step in attempt.split(" , ")),
        VERDICT: not all(TRUE_OF[verdict](_result(made), _number(target)) for made, target, verdict in attempts),
        REPEATED: len(set(steps)) < len(steps),
        AFTER: any(verdict == "yes" for _, _, verdict in attempts[:-1]),
    }
    return [fault for fault in FAULTS if found[fault]]


def form(
    prompts: list[Any], completions: list[Any], status: list[str] | None = None, **kwargs: Any
) -> list[float | None]:
    """1 where a completion has no ``faults``, else 0; None where it was never finished (status ``error``).

    TRL's signature: lists with one entry a completion.
    """
    ended = status or ["stop"] * len(completions)
    return [
        None if how == "error" else float(not faults(text, how)) for text, how in zip(completions, ended, strict=True)
    ]


def _is_true(step: str) -> bool:
    left, op, right, _, result = step.split()
    a, b, c = _number(left), _number(right), _number(result)
    if op == "/":
        return b != 0 and a == b * c
    return {"+": a + b, "-": a - b, "*": a * b}[op] == c


def _result(steps: str) -> int:
    return _number(steps.rpartition(" ")[2])


def _number(digits: str) -> int:
    """Of a model's own digits: thousands of them are no number of this game, and int() would refuse them."""
    return int(digits) if len(digits) < 20 else -1
