"""Search traces for the supervised start: a beginner's notes on countdown tasks, some diligent and most not.

A trace tries combinations of the numbers one after another in explicit steps, compares each result with the target (too
small, too large, yes), and ends in an answer:

    6 3 9 = 27  ->  <think> 6 + 3 = 9 , 9 + 9 = 18 ? 27 < 6 * 3 = 18 , 18 + 9 = 27 ? 27 yes </think>
                    <answer> ( 6 * 3 ) + 9 </answer>

The target is repeated beside each result, and a miss says in which direction. A small model learns this much sooner
than to look up the target and say yes or no.

The length of a trace is drawn at random, whatever the task. Most give up after an attempt or two and answer with what
they have, which is wrong; some search on. The rule reward can teach that searching on pays.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import cycle, islice
from typing import Any, NamedTuple

from data import countdown
from data.dataset import builds_dataset

DEFAULT_SIZE = {"train": 65_536, "eval": 1_024}
GIVE_UP = (0.55, 0.3)
LONGEST = 10
SPREAD = 30.0


def rows(
    split: countdown.Split,
    size: int | None = None,
    seed: int = 0,
    *,
    give_up: Sequence[float] = GIVE_UP,
    longest: int = LONGEST,
    spread: float = SPREAD,
    min_numbers: int = 3,
    max_numbers: int = 3,
    min_number: int = 1,
    max_number: int = 9,
    min_target: int = 1,
    max_target: int = 60,
) -> list[dict[str, Any]]:
    """Traces for the tasks in one split of ``data/countdown.py``: rows of ``prompt`` (compact form) and ``completion``.

    If there are fewer tasks than rows, tasks come again with their numbers in another order and another trace. The
    other arguments are those of ``trace`` and of ``countdown.build``. Raises ValueError if they make no sense.
    """
    limits = {"min_number": min_number, "max_number": max_number, "min_target": min_target, "max_target": max_target}
    tasks = countdown.rows(split, None, seed, min_numbers=min_numbers, max_numbers=max_numbers, **limits)
    found = []
    for i, task in enumerate(islice(cycle(tasks), DEFAULT_SIZE[split] if size is None else size)):
        draw = random.Random(f"{seed}/{split}/{i}")
        nums, target = draw.sample(task["nums"], len(task["nums"])), task["target"]
        question = countdown.QUESTIONS["compact"].format(spaced=" ".join(map(str, nums)), target=target)
        completion = trace(nums, target, draw, give_up=give_up, longest=longest, spread=spread)
        found.append({"prompt": question, "completion": completion})
    return found


build = builds_dataset(rows)


def trace(
    nums: Sequence[int],
    target: int,
    draw: random.Random,
    *,
    give_up: Sequence[float] = GIVE_UP,
    longest: int = LONGEST,
    spread: float = SPREAD,
) -> str:
    """One trace. It stops at the first attempt that hits the target, or after a random number of attempts.

    That number is ``k + 1`` with probability ``give_up[k]``, otherwise ``longest``. No attempt is made twice. Each is
    picked with probability proportional to exp(-|value - target| / ``spread``): a small spread makes good guesses, an
    infinite one blind ones. Raises ValueError if the arguments make no sense.
    """
    chances = [*give_up, max(0.0, 1 - sum(give_up))]
    if min(chances) < 0 or sum(chances) > 1 + 1e-9:
        raise ValueError(f"give_up: {list(give_up)} are not chances that sum to at most 1")
    if longest < len(chances):
        raise ValueError(f"longest: {longest} attempts are no more than the {len(give_up)} that give_up speaks of")
    if not spread > 0:
        raise ValueError(f"spread: must be above 0, not {spread}")
    patience = draw.choices([*range(1, len(chances)), longest], chances)[0]

    def order(attempt: Attempt) -> float:  # sorting by log-weight plus Gumbel noise draws without replacement
        return abs(attempt.value - target) / spread + math.log(-math.log(1 - draw.random()) + 1e-300)

    words = ["<think>"]
    for attempt in sorted(attempts(tuple(sorted(nums))), key=order)[:patience]:
        verdict = "yes" if attempt.value == target else "<" if attempt.value < target else ">"
        words += [attempt.steps, "?", str(target), verdict]
        if verdict == "yes":
            break
    return " ".join([*words, "</think> <answer>", attempt.expression, "</answer>"])


class Attempt(NamedTuple):
    """One way to combine all numbers: its steps as written, the expression they amount to, and its value."""

    steps: str
    expression: str
    value: int


@lru_cache(maxsize=4096)
def attempts(nums: tuple[int, ...]) -> tuple[Attempt, ...]:
    """All attempts that use each number once and stay in the non-negative integers: 3 numbers have about 40."""
    return tuple(dict.fromkeys(_attempts([(n, str(n)) for n in nums], [])))


_Term = tuple[int, str]  # value and expression


def _attempts(terms: list[_Term], steps: list[str]) -> Iterator[Attempt]:
    """Every way to join the terms, two at a time, into one."""
    if len(terms) == 1:
        value, expression = terms[0]
        yield Attempt(" , ".join(steps), expression.removeprefix("( ").removesuffix(" )"), value)
        return
    for i in range(len(terms)):
        for j in range(i):
            others = [term for k, term in enumerate(terms) if k not in (i, j)]
            for step, joined in _join(terms[i], terms[j]):
                yield from _attempts([*others, joined], [*steps, step])


def _join(a: _Term, b: _Term) -> Iterator[tuple[str, _Term]]:
    """Every step on two terms: its text and the term that it makes. The larger operand comes first."""
    (large, left), (small, right) = (a, b) if a[0] >= b[0] else (b, a)
    results = {"+": large + small, "-": large - small, "*": large * small}
    if small and large % small == 0:
        results["/"] = large // small
    for op, value in results.items():
        yield f"{large} {op} {small} = {value}", (value, f"( {left} {op} {right} )")
