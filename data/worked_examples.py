"""Countdown worked in plain text, for a pretrained model: the search traces of ``data/traces.py``, respelled.

    6 3 9 = 27  ->  <think>6+3=9, 9+9=18, 27? low
                    6*3=18, 18+9=27, 27? yes
                    </think>
                    <answer>(6*3)+9</answer>

A tokenizer made for text spends a token on the space before a digit, so there is none. One attempt is one line. The
examples are as mixed in diligence: most give up after an attempt or two and answer with what they have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from data import countdown, traces
from data.dataset import builds_dataset

GIVE_UP = (0.5, 0.25)
LONGEST = 5
WORDS = {"<": "low", ">": "high", "yes": "yes"}  # how the attempt compares with the target


def rows(
    split: countdown.Split,
    size: int | None = None,
    seed: int = 0,
    *,
    give_up: Sequence[float] = GIVE_UP,
    longest: int = LONGEST,
    spread: float = traces.SPREAD,
    min_numbers: int = 3,
    max_numbers: int = 3,
    min_number: int = 1,
    max_number: int = 9,
    min_target: int = 1,
    max_target: int = 60,
) -> list[dict[str, Any]]:
    """Rows of ``prompt`` (compact form) and ``completion`` for one split; the arguments are those of ``traces.build``.

    Raises ValueError if they make no sense.
    """
    found = traces.rows(
        split,
        size,
        seed,
        give_up=give_up,
        longest=longest,
        spread=spread,
        min_numbers=min_numbers,
        max_numbers=max_numbers,
        min_number=min_number,
        max_number=max_number,
        min_target=min_target,
        max_target=max_target,
    )
    return [{"prompt": row["prompt"], "completion": plain_text(row["completion"])} for row in found]


build = builds_dataset(rows)


def plain_text(trace: str) -> str:
    """A trace of ``data/traces.py`` without its spaces, one attempt a line, comparisons in words."""
    text = re.sub(r"\?(\d+)(yes|[<>])", lambda found: f",{found[1]}? {WORDS[found[2]]}\n", trace.replace(" ", ""))
    return text.replace(",", ", ").replace("</think>", "</think>\n")
