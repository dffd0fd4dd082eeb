"""Answers to word sums with large numbers for the supervised start, some of which call a calculator.

    Tom has 38 apples , buys 27 boxes of 14 . how many ?
      ->  <answer> 391 </answer>                                                   guessed, mostly wrong
      or  <tool_call> … 27 * 14 … </tool_call>  378  <answer> 391 </answer>        begun, then guessed
      or  <tool_call> … 27 * 14 … </tool_call>  378
          <tool_call> … 38 + 378 … </tool_call>  416  <answer> 416 </answer>       each step looked up

One of the three is drawn at random, whatever the story. The reward for the right number can teach that calling pays:
the numbers are too large for a small model to know the products by heart. The calls are in the form that the built-in
environment ``calculator`` reads, and what it answers are messages of the role ``tool``, which are not imitated. With
``form: python`` there is one call at most, a fenced block that ``python`` runs (`environment.tool_format: python`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, Literal

from data import word_sums
from data.dataset import builds_dataset

DEFAULT_SIZE = {"train": 65_536, "eval": 1_024}
HASTE = (0.5, 0.25)
SPREAD = 40.0
BEGIN, END = '{"name": "calculate", "arguments": {"expression": "', '"}}'
WORDS = (*word_sums.WORDS, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", BEGIN, END, "error")

Message = dict[str, str]
Form = Literal["hermes", "python"]
FORMS = ("hermes", "python")


def rows(
    split: word_sums.Split,
    size: int | None = None,
    seed: int = 0,
    *,
    haste: Sequence[float] = HASTE,
    spread: float = SPREAD,
    form: Form = "hermes",
    **story: Any,
) -> list[dict[str, Any]]:
    """Rows of ``prompt`` and ``completion`` (messages) for the stories of one split of ``data/word_sums.py``.

    If there are fewer stories than rows, stories come again with other traces. ``haste``, ``spread`` and ``form`` are
    explained at ``trace``; ``story`` are the arguments of ``word_sums.build``. Raises ValueError if they make no sense.
    """
    wanted = DEFAULT_SIZE.get(split) if size is None else size
    stories = islice(word_sums.word_sums(split, seed, **story), wanted)
    found = []
    for i, one in enumerate(islice(cycle(stories), wanted)):
        draw = random.Random(f"calculator_traces/{seed}/{split}/{i}")
        found.append({"prompt": one.question, "completion": trace(one, draw, haste=haste, spread=spread, form=form)})
    return found


build = builds_dataset(rows)


def trace(
    story: word_sums.WordSum,
    draw: random.Random,
    *,
    haste: Sequence[float] = HASTE,
    spread: float = SPREAD,
    form: Form = "hermes",
) -> list[Message]:
    """One trace. ``haste`` has the probabilities of a guess at once and after the first step; else every step is looked
    up: by a call each, or with ``form: python`` all in one block.

    A guess is the answer with normal noise of standard deviation ``spread``. Raises ValueError if the arguments make no
    sense.
    """
    if form not in FORMS:
        raise ValueError(f"form is {' or '.join(FORMS)}, not {form!r}")
    if len(haste) != 2 or min(haste) < 0 or sum(haste) > 1:
        raise ValueError(f"haste: {list(haste)} are not two chances that sum to at most 1")
    if not spread > 0:
        raise ValueError(f"spread: must be above 0, not {spread}")
    calls = draw.choices((0, 1, len(story.steps)), [*haste, 1 - sum(haste)])[0]
    guess = max(0, story.answer + round(draw.gauss(0, spread)))
    if form == "python":
        messages = _run(*_whole(story.steps[:calls])) if calls else []
    else:
        messages = [message for step in story.steps[:calls] for message in _called(*step.split(" = "))]
    answer = story.answer if calls == len(story.steps) else guess
    return [*messages, {"role": "assistant", "content": f"<answer> {answer} </answer>"}]


def _called(expression: str, result: str) -> list[Message]:
    call = f"<tool_call> {BEGIN} {expression} {END} </tool_call>"
    return [{"role": "assistant", "content": call}, {"role": "tool", "content": result}]


def _run(expression: str, result: str) -> list[Message]:
    block = f"```python\n{expression}\n```\n"
    return [{"role": "assistant", "content": block}, {"role": "tool", "content": result}]


def _whole(steps: Sequence[str]) -> tuple[str, str]:
    """Steps as one expression, and its value. A product is a step of its own, before the one that takes it."""
    total = product = value = ""
    for step in steps:
        left, value = step.split(" = ")
        a, sign, b = left.split(" ")
        if sign == "*":
            product = left
        else:
            total, product = f"{total or a} {sign} {product or b}", ""
    return total or product, value
