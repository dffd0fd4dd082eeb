"""Word sums for the tiny model: small stories that ask how many, in a vocabulary of fifty words.

    Tom has 9 apples , buys 3 boxes of 4 , gives away 5 . how many ?  ->  16

``data/tiny.py`` gives each of the ``WORDS`` a token. ``data/word_sum_traces.py`` holds the answers to imitate; the
reward is ``math``. Two stories are the same sum if their numbers and operations are, whoever owns what. A hash of these
decides a sum's split.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

from data.dataset import builds_dataset
from data.splits import held_out

Split = Literal["train", "eval"]

DEFAULT_SIZE = {"train": 16_384, "eval": 1_024}
EVAL_SHARE = 8  # one sum in 8 is held out
GIVE_UP_AFTER = 10_000  # draws in a row without a new story

NAMES = ("Ann", "Ben", "Eva", "Ida", "Kim", "Leo", "Max", "Sam", "Tom", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "eggs", "nuts", "pens", "stamps")
MORE = ("finds {}", "gets {}", "buys {}")
LESS = ("loses {}", "sells {}", "gives away {}")
BOXES = "{} boxes of {}"
WORDS = (
    *NAMES, *THINGS, "has", "finds", "gets", "buys", "loses", "sells", "gives", "away", "boxes", "of", "how", "many",
    "about",
)  # fmt: skip


class WordSum(NamedTuple):
    """A story, its solution one operation at a time, and the result."""

    question: str
    steps: tuple[str, ...]
    answer: int

    @property
    def key(self) -> str:
        return " , ".join(self.steps)


def rows(
    split: Split,
    size: int | None = None,
    seed: int = 0,
    *,
    events: int = 2,
    largest: int = 9,
    most: int = 30,
    boxed: float = 0.4,
    boxes: int = 4,
    each: int = 5,
) -> list[dict[str, Any]]:
    """Rows of ``prompt`` (a story) and ``answer`` (the number as text), no story twice.

    Things come or go ``events`` times, one by one or, with probability ``boxed``, in 2 to ``boxes`` boxes of 2 to
    ``each``; numbers in a story are 1 to ``largest``, and nobody ever has more than ``most`` things or fewer than none.
    Row ``i`` does not depend on ``size`` (None is ``DEFAULT_SIZE``). Raises ValueError for arguments that make no
    sense, or that allow fewer stories than asked for.
    """
    wanted = DEFAULT_SIZE[split] if size is None and split in DEFAULT_SIZE else size
    stories = word_sums(split, seed, events=events, largest=largest, most=most, boxed=boxed, boxes=boxes, each=each)
    sums = list(islice(stories, wanted))
    if size is not None and len(sums) < size:
        raise ValueError(f"word_sums has only {len(sums)} distinct {split} stories, {size} were asked for")
    return [{"prompt": s.question, "answer": str(s.answer)} for s in sums]


build = builds_dataset(rows)


def word_sums(
    split: Split,
    seed: int,
    *,
    events: int = 2,
    largest: int = 9,
    most: int = 30,
    boxed: float = 0.4,
    boxes: int = 4,
    each: int = 5,
) -> Iterator[WordSum]:
    """The distinct stories of a split in an order set by the seed. Arguments and errors are those of ``build``."""
    if split not in DEFAULT_SIZE:
        raise ValueError(f"split is train or eval, not {split!r}")
    bounds = (("events", events, 1, 5), ("largest", largest, 3, 99), ("most", most, largest, 9999))
    bounds += (("boxes", boxes, 2, 99), ("each", each, 2, 99))
    for name, value, low, high in bounds:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} is an integer from {low} to {high}, not {value!r}")
    if not 0 <= boxed <= 1:
        raise ValueError(f"boxed is a probability, not {boxed!r}")
    draw, seen, barren = random.Random(f"word_sums/{split}/{seed}"), set(), 0
    while barren < GIVE_UP_AFTER:
        story = _story(draw, events, largest, most, (boxed, boxes, each))
        barren += 1
        if story.question not in seen and held_out(story.key, EVAL_SHARE) == (split == "eval"):
            seen.add(story.question)
            barren = 0
            yield story


def _story(draw: random.Random, events: int, largest: int, most: int, packed: tuple[float, int, int]) -> WordSum:
    in_boxes, most_boxes, most_each = packed
    total = draw.randint(2, largest)  # "1 apples" would read badly
    told = [f"{draw.choice(NAMES)} has {total} {draw.choice(THINGS)}"]
    steps: list[str] = []
    while len(told) <= events:
        boxed, sign = draw.random() < in_boxes, draw.choice((1, -1))
        if boxed:
            boxes, each = draw.randint(2, most_boxes), draw.randint(2, min(most_each, largest))
            number, words = boxes * each, BOXES.format(boxes, each)
        else:
            number = draw.randint(1, largest)
            words = str(number)
        if not 0 <= total + sign * number <= most:
            continue
        if boxed:
            steps.append(f"{boxes} * {each} = {number}")
        steps.append(f"{total} {'+' if sign > 0 else '-'} {number} = {total + sign * number}")
        total += sign * number
        told.append(draw.choice(MORE if sign > 0 else LESS).format(words))
    return WordSum(" , ".join(told) + " . how many ?", tuple(steps), total)
