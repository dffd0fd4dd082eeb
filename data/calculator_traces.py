"""Answers to word sums with large numbers for the supervised start, some of which call a calculator.

    Tom has 38 apples , buys 27 boxes of 14 . how many ?
      ->  <answer> 391 </answer>                                                   guessed, mostly wrong
      or  <tool_call> … 27 * 14 … </tool_call>  378  <answer> 391 </answer>        begun, then guessed
      or  <tool_call> … 27 * 14 … </tool_call>  378
          <tool_call> … 38 + 378 … </tool_call>  416  <answer> 416 </answer>       each step looked up

One of the three is drawn at random, whatever the story. The reward for the right number can teach that calling pays:
the numbers are too large for a small model to know the products by heart. The calls are in the form that the built-in
environment ``calculator`` reads, and what it answers are messages of the role ``tool``, which are not imitated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from data import word_sums
from data.dataset import builds_dataset

DEFAULT_SIZE = {"train": 65_536, "eval": 1_024}
HASTE = (0.5, 0.25)
SPREAD = 40.0
BEGIN, END = '{"name": "calculate", "arguments": {"expression": "', '"}}'
WORDS = (*word_sums.WORDS, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", BEGIN, END, "error")

Message = dict[str, str]


def rows(
    split: word_sums.Split,
    size: int | None = None,
    seed: int = 0,
    *,
    haste: Sequence[float] = HASTE,
    spread: float = SPREAD,
    **story: Any,
) -> list[dict[str, Any]]:
    """Rows of ``prompt`` and ``completion`` (messages) for the stories of one split of ``data/word_sums.py``.

    If there are fewer stories than rows, stories come again with other traces. ``haste`` and ``spread`` are explained
    at ``trace``; ``story`` are the arguments of ``word_sums.build``. Raises ValueError if they make no sense.
    """
    wanted = DEFAULT_SIZE.get(split) if size is None else size
    stories = islice(word_sums.word_sums(split, seed, **story), wanted)
    found = []
    for i, one in enumerate(islice(cycle(stories), wanted)):
        draw = random.Random(f"calculator_traces/{seed}/{split}/{i}")
        found.append({"prompt": one.question, "completion": trace(one, draw, haste=haste, spread=spread)})
    return found


build = builds_dataset(rows)


def trace(
    story: word_sums.WordSum, draw: random.Random, *, haste: Sequence[float] = HASTE, spread: float = SPREAD
) -> list[Message]:
    """One trace. ``haste`` has the probabilities of a guess at once and after the first call; else every step is one.

    A guess is the answer with normal noise of standard deviation ``spread``. Raises ValueError if the arguments make no
    sense.
    """
    if len(haste) != 2 or min(haste) < 0 or sum(haste) > 1:
        raise ValueError(f"haste: {list(haste)} are not two chances that sum to at most 1")
    if not spread > 0:
        raise ValueError(f"spread: must be above 0, not {spread}")
    calls = draw.choices((0, 1, len(story.steps)), [*haste, 1 - sum(haste)])[0]
    guess = max(0, story.answer + round(draw.gauss(0, spread)))
    messages = [message for step in story.steps[:calls] for message in _called(*step.split(" = "))]
    answer = story.answer if calls == len(story.steps) else guess
    return [*messages, {"role": "assistant", "content": f"<answer> {answer} </answer>"}]


def _called(expression: str, result: str) -> list[Message]:
    call = f"<tool_call> {BEGIN} {expression} {END} </tool_call>"
    return [{"role": "assistant", "content": call}, {"role": "tool", "content": result}]
