"""Games of guessing a number, for the built-in environment ``number_guess``.

    game 417 : guess a number from 1 to 63 in 8 turns

The number (``secret``) is a column of the row. ``prompt`` does not tell it: the game's own number is only there to tell
games apart, and a hash of it decides the split. ``data/number_guess_traces.py`` holds games to imitate.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count, islice
from typing import Any, Literal

from data.dataset import builds_dataset
from data.splits import held_out

Split = Literal["train", "eval"]

DEFAULT_SIZE = {"train": 8_192, "eval": 1_024}
EVAL_SHARE = 8  # one game in 8 is held out
WORDS = ("game", "guess", "a", "number", "from", "to", "in", "turns", "higher", "lower", "found", "error")


def rows(
    split: Split, size: int | None = None, seed: int = 0, *, low: int = 1, high: int = 63, max_turns: int = 8
) -> list[dict[str, Any]]:
    """Rows of ``prompt``, ``secret``, ``low``, ``high`` and ``max_turns``; the secret is drawn evenly from ``low`` to
    ``high``, both included.

    Row ``i`` does not depend on ``size`` (None is ``DEFAULT_SIZE``). Raises ValueError for arguments that make no
    sense.
    """
    if split not in DEFAULT_SIZE:
        raise ValueError(f"split is train or eval, not {split!r}")
    if not (isinstance(low, int) and isinstance(high, int) and 0 <= low < high):
        raise ValueError(f"low and high: need integers, 0 <= low < high, got {low!r} and {high!r}")
    if not isinstance(max_turns, int) or max_turns < 1:
        raise ValueError(f"max_turns: need at least 1, got {max_turns!r}")
    wanted = DEFAULT_SIZE[split] if size is None else size
    told = {"low": low, "high": high, "max_turns": max_turns}
    return [
        {
            "prompt": f"game {game} : guess a number from {low} to {high} in {max_turns} turns",
            "secret": random.Random(f"number_guess/{seed}/{game}/{low}/{high}").randint(low, high),
            **told,
        }
        for game in islice(_games(split), wanted)
    ]


build = builds_dataset(rows)


def _games(split: Split) -> Iterator[int]:
    """The numbers of the games of a split."""
    return (game for game in count(1) if held_out(f"number_guess/{game}", EVAL_SHARE) == (split == "eval"))
