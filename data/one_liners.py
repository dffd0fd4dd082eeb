"""One-liners for the tiny model: a function of one line from a description, checked by tests.

    f ( x ) : add 3 , double , subtract 4
      ->  ```python
          def f ( x ) : return ( x + 3 ) * 2 - 4
          ```

Each operation applies to the whole result of those before it, so the difficulty is where parentheses are needed.
``data/tiny.py`` gives each of the ``WORDS`` a token, the line break among them, so that decoded text holds a fenced
block. The reward is ``code``; ``data/one_liner_traces.py`` holds the answers to imitate. A description's own hash alone
decides its split.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from data.dataset import builds_dataset
from data.splits import held_out

Split = Literal["train", "eval"]

DEFAULT_SIZE = {"train": 16_384, "eval": 1_024}
EVAL_SHARE = 8  # one description in 8 is held out
GIVE_UP_AFTER = 10_000  # draws in a row without a new description

INPUTS = (-7, -2, 0, 1, 3, 10)
FENCE, END_FENCE, LINE_BREAK = "```python", "```", "\n"
WORDS = (
    FENCE, END_FENCE, LINE_BREAK, "**", "def", "return", "add", "subtract", "times", "double", "triple", "square",
    "negate", "easy",
)  # fmt: skip

_SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(1, 6)  # how tightly an expression binds


class Operation(NamedTuple):
    """Its words, the text around its operand, how tightly the result binds, and how tightly the operand must bind."""

    told: str
    written: str
    binds: int
    operand: int


def rows(
    split: Split, size: int | None = None, seed: int = 0, *, operations: Sequence[int] = (3,), largest: int = 9
) -> list[dict[str, Any]]:
    """Rows of ``prompt`` (a description) and ``tests``, no description twice.

    ``tests`` is the JSON text of ``{"fn_name": "f", "inputs": [[-7], …], "outputs": […]}``. ``operations`` lists how
    many a description may have; these counts are equally frequent until one has no more descriptions. Numbers are 2 to
    ``largest``. Row ``i`` does not depend on ``size`` (None is ``DEFAULT_SIZE``). Raises ValueError for arguments that
    make no sense, or that allow fewer descriptions than asked for.
    """
    wanted = DEFAULT_SIZE[split] if size is None and split in DEFAULT_SIZE else size
    found = list(islice(one_liners(split, seed, operations=operations, largest=largest), wanted))
    if size is not None and len(found) < size:
        raise ValueError(f"one_liners has only {len(found)} distinct {split} descriptions, {size} were asked for")
    return [
        {"prompt": describe(row), "tests": tests(row), "solution": f"def f(x): return {steps(row)[-1]}"}
        for row in found
    ]


build = builds_dataset(rows)


def one_liners(
    split: Split, seed: int, *, operations: Sequence[int] = (3,), largest: int = 9
) -> Iterator[tuple[Operation, ...]]:
    """The distinct descriptions of a split in an order set by the seed. Arguments and errors are those of ``build``."""
    if split not in DEFAULT_SIZE:
        raise ValueError(f"split is train or eval, not {split!r}")
    if not operations or not all(isinstance(n, int) and 1 <= n <= 5 for n in operations):
        raise ValueError(f"operations are integers from 1 to 5, not {operations!r}")
    if not isinstance(largest, int) or isinstance(largest, bool) or not 2 <= largest <= 99:
        raise ValueError(f"largest is an integer from 2 to 99, not {largest!r}")
    draw, seen, barren = random.Random(f"one_liners/{split}/{seed}"), set(), 0
    while barren < GIVE_UP_AFTER:
        row = tuple(_operation(draw, largest) for _ in range(draw.choice(operations)))
        told = describe(row)
        barren += 1
        if (
            told not in seen
            and sum(op.told == "square" for op in row) < 2  # two can make numbers of a dozen digits
            and held_out(told, EVAL_SHARE) == (split == "eval")
        ):
            seen.add(told)
            barren = 0
            yield row


def _operation(draw: random.Random, largest: int) -> Operation:
    n = draw.randint(2, largest)
    return draw.choice(
        (
            Operation(f"add {n}", f"{{}} + {n}", _SUM, _SUM),
            Operation(f"subtract {n}", f"{{}} - {n}", _SUM, _SUM),
            Operation(f"times {n}", f"{{}} * {n}", _PRODUCT, _PRODUCT),
            Operation("double", "{} * 2", _PRODUCT, _PRODUCT),
            Operation("triple", "{} * 3", _PRODUCT, _PRODUCT),
            Operation("negate", "- {}", _SIGN, _SIGN),
            Operation("square", "{} ** 2", _POWER, _ATOM),
        )
    )


def describe(row: Sequence[Operation]) -> str:
    return "f ( x ) : " + " , ".join(op.told for op in row)


def steps(row: Sequence[Operation]) -> list[str]:
    """The expression after each operation, with the parentheses it needs; the last one is the solution."""
    text, binds, written = "x", _ATOM, []
    for op in row:
        text = op.written.format(text if binds >= op.operand else f"( {text} )")
        binds = op.binds
        written.append(text)
    return written


def program(expression: str) -> str:
    """The answer at the end of a completion, spaced as ``data/tiny.py`` decodes it."""
    return f"{FENCE} {LINE_BREAK} def f ( x ) : return {expression} {LINE_BREAK} {END_FENCE}"


def tests(row: Sequence[Operation]) -> str:
    expression = steps(row)[-1]
    outputs = [eval(expression, {"__builtins__": {}}, {"x": x}) for x in INPUTS]  # our own text, of our own operations
    return json.dumps({"fn_name": "f", "inputs": [[x] for x in INPUTS], "outputs": outputs})
