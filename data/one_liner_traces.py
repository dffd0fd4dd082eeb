"""Answers to one-liners for the supervised start. Their quality is mixed: most are hasty, some go step by step.

    f ( x ) : add 3 , double
      ->  <think> easy </think> ... return x + 3 * 2       hasty: no parentheses, right where none are needed
      or  <think> easy </think> ... return x * 2           careless: an operation is forgotten as well
      or  <think> x + 3 , ( x + 3 ) * 2 </think> ... return ( x + 3 ) * 2                spelled out: right

One of the three is drawn at random, whatever the description. The tests can teach that spelling the steps out pays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from data.dataset import builds_dataset
from data.one_liners import Operation, Split, describe, one_liners, program, steps

DEFAULT_SIZE = {"train": 65_536, "eval": 1_024}
HASTE = (0.35, 0.4)


def rows(
    split: Split,
    size: int | None = None,
    seed: int = 0,
    *,
    haste: Sequence[float] = HASTE,
    operations: Sequence[int] = (3,),
    largest: int = 9,
) -> list[dict[str, Any]]:
    """Rows of ``prompt`` and ``completion`` for the descriptions of one split of ``data/one_liners.py``.

    If there are fewer descriptions than rows, they come again with other traces. ``haste`` is explained at ``trace``,
    the rest at ``one_liners.build``. Raises ValueError if they make no sense.
    """
    wanted = DEFAULT_SIZE.get(split) if size is None else size
    descriptions = islice(one_liners(split, seed, operations=operations, largest=largest), wanted)
    found = []
    for i, row in enumerate(islice(cycle(descriptions), wanted)):
        draw = random.Random(f"one_liner_traces/{seed}/{split}/{i}")
        found.append({"prompt": describe(row), "completion": trace(row, draw, haste=haste)})
    return found


build = builds_dataset(rows)


def trace(row: Sequence[Operation], draw: random.Random, *, haste: Sequence[float] = HASTE) -> str:
    """One trace. ``haste`` has the probabilities of a hasty and of a careless one; otherwise it is spelled out.

    Raises ValueError if ``haste`` makes no sense.
    """
    if len(haste) != 2 or min(haste) < 0 or sum(haste) > 1:
        raise ValueError(f"haste: {list(haste)} are not two chances that sum to at most 1")
    kind = draw.choices(("hasty", "careless", "spelled out"), [*haste, 1 - sum(haste)])[0]
    if kind == "spelled out":
        return f"<think> {' , '.join(steps(row))} </think> {program(steps(row)[-1])}"
    forgotten = draw.randrange(len(row)) if kind == "careless" else None
    text = "x"
    for place, op in enumerate(row):
        if place != forgotten:
            text = op.written.format(text)
    return f"<think> easy </think> {program(text)}"
