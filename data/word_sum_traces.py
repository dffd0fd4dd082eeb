"""Answers to word sums for the supervised start. Their diligence is mixed: most are rough guesses, some are worked out.

    Tom has 12 apples , buys 3 boxes of 4 , gives away 5 . how many ?
      ->  <think> about 23 </think> <answer> 23 </answer>                                         a guess, mostly wrong
      or  <think> 3 * 4 = 12 , about 17 </think> <answer> 17 </answer>                            begun, then guessed
      or  <think> 3 * 4 = 12 , 12 + 12 = 24 , 24 - 5 = 19 </think> <answer> 19 </answer>          worked out

One of the three is drawn at random, whatever the story. The rule reward can teach that working it out pays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from data.dataset import builds_dataset
from data.word_sums import Split, WordSum, word_sums

DEFAULT_SIZE = {"train": 65_536, "eval": 1_024}
HASTE = (0.4, 0.25)
SPREAD = 6.0


def rows(
    split: Split,
    size: int | None = None,
    seed: int = 0,
    *,
    haste: Sequence[float] = HASTE,
    spread: float = SPREAD,
    events: int = 2,
    largest: int = 9,
    most: int = 30,
) -> list[dict[str, Any]]:
    """Rows of ``prompt`` and ``completion`` for the stories of one split of ``data/word_sums.py``.

    If there are fewer stories than rows, stories come again with other traces. ``haste`` and ``spread`` are explained
    at ``trace``, the rest at ``word_sums.build``. Raises ValueError if they make no sense.
    """
    wanted = DEFAULT_SIZE.get(split) if size is None else size
    stories = islice(word_sums(split, seed, events=events, largest=largest, most=most), wanted)
    found = []
    for i, story in enumerate(islice(cycle(stories), wanted)):
        draw = random.Random(f"word_sum_traces/{seed}/{split}/{i}")
        found.append({"prompt": story.question, "completion": trace(story, draw, haste=haste, spread=spread)})
    return found


build = builds_dataset(rows)


def trace(story: WordSum, draw: random.Random, *, haste: Sequence[float] = HASTE, spread: float = SPREAD) -> str:
    """One trace. ``haste`` has the probabilities of a guess at once and after half the steps; else it is worked out.

    A guess is the answer with normal noise of standard deviation ``spread`` (half of that after half the steps). Raises
    ValueError if the arguments make no sense.
    """
    if len(haste) != 2 or min(haste) < 0 or sum(haste) > 1:
        raise ValueError(f"haste: {list(haste)} are not two chances that sum to at most 1")
    if not spread > 0:
        raise ValueError(f"spread: must be above 0, not {spread}")
    kind = draw.choices(("guessed", "begun", "worked out"), [*haste, 1 - sum(haste)])[0]
    if kind == "worked out":
        thoughts, answer = list(story.steps), story.answer
    else:
        steps, noise = ([], spread) if kind == "guessed" else (list(story.steps[: len(story.steps) // 2]), spread / 2)
        answer = max(0, story.answer + round(draw.gauss(0, noise)))
        thoughts = [*steps, f"about {answer}"]
    return f"<think> {' , '.join(thoughts)} </think> <answer> {answer} </answer>"
