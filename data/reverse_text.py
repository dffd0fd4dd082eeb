"""Reverse text: a sentence, to be written backwards character by character.

    The old teacher carries seven green boxes to the river.  ->  .revir eht ot sexob neerg neves seirrac rehcaet dlo ehT

Models read tokens of several characters, so a pretrained one copies words in reverse order, or fails. The task is that
of prime-rl's example on Wikipedia's paragraphs (``PrimeIntellect/Reverse-Text-RL``); these sentences are made here. The
reward is ``similarity``. A hash of a sentence decides its split.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

from data.dataset import builds_dataset
from data.splits import held_out

Split = Literal["train", "eval"]

DEFAULT_SIZE = {"train": 8_192, "eval": 512}
EVAL_SHARE = 10  # one sentence in 10 is held out
QUESTION = "Reverse the text character by character. Put the reversed text in <answer> </answer> tags.\n\n{text}"


def _words(text: str, between: str | None = None) -> list[str]:
    return text.split(between)


ADJECTIVES = _words("""old young quiet tired clever careful famous friendly gentle patient lonely cheerful brave nervous
honest curious busy stubborn polite grumpy""")
PEOPLE = _words("""teacher farmer doctor painter baker sailor neighbour student engineer gardener writer pilot carpenter
musician librarian fisherman mechanic nurse tailor shepherd""")
VERBS = _words("""carries finds counts cleans sells hides paints repairs borrows collects describes drops forgets
examines gathers measures orders returns studies wraps""")
NUMBERS = _words("two three four five six seven eight nine ten eleven twelve twenty")
COLOURS = _words("red green blue yellow white black brown purple grey golden silver orange")
THINGS = _words("""boxes books lamps chairs bottles maps keys letters apples baskets coats hammers clocks mirrors
pictures tickets blankets candles ribbons stones""")
PLACES = _words(
    "at the station|by the river|behind the house|in the garden|near the old bridge|on the market square|"
    "under the table|before sunrise|after the long winter|across the valley|in a small village|"
    "without a word|along the northern coast|during the storm|next to the library|"
    "at the edge of the forest",
    "|",
)
LINKS = ("while", "because", "although", "before", "after", "until")


def rows(split: Split, size: int | None = None, seed: int = 0, *, clauses: int = 2) -> list[dict[str, Any]]:
    """Rows of ``prompt`` (the task), ``answer`` (the sentence reversed) and ``completion`` (the answer in its tags, to
    imitate), no sentence twice. A sentence has 1 to ``clauses`` clauses of 50 characters or so.

    Row ``i`` does not depend on ``size`` (None is ``DEFAULT_SIZE``). Raises ValueError for arguments without sense.
    """
    if split not in DEFAULT_SIZE:
        raise ValueError(f"split is train or eval, not {split!r}")
    if not isinstance(clauses, int) or isinstance(clauses, bool) or not 1 <= clauses <= 6:
        raise ValueError(f"clauses is an integer from 1 to 6, not {clauses!r}")
    wanted = DEFAULT_SIZE[split] if size is None else size
    return [_row(text) for text in islice(_sentences(split, seed, clauses), wanted)]


build = builds_dataset(rows)


def _row(text: str) -> dict[str, str]:
    answer = text[::-1]
    completion = f"<answer>{answer}</answer>"
    return {"prompt": QUESTION.format(text=text), "answer": answer, "completion": completion}


def _sentences(split: Split, seed: int, clauses: int) -> Iterator[str]:
    draw, seen = random.Random(f"reverse_text/{split}/{seed}"), set()
    while True:  # there are 10^9 clauses
        parts = [_clause(draw) for _ in range(draw.randint(1, clauses))]
        text = parts[0]
        for part in parts[1:]:
            text += f" {draw.choice(LINKS)} {part}"
        text = text[0].upper() + text[1:] + "."
        if text not in seen and held_out(text, EVAL_SHARE) == (split == "eval"):
            seen.add(text)
            yield text


def _clause(draw: random.Random) -> str:
    who = f"the {draw.choice(ADJECTIVES)} {draw.choice(PEOPLE)}"
    what = f"{draw.choice(NUMBERS)} {draw.choice(COLOURS)} {draw.choice(THINGS)}"
    return f"{who} {draw.choice(VERBS)} {what} {draw.choice(PLACES)}"
