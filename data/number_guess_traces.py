"""Games of guessing a number for the supervised start, by players of mixed skill.

    game 417 : guess a number from 1 to 63 in 8 turns
      ->  50   lower   7   higher   52   lower  …      wild: any number that was not said yet
      or  50   lower   7   higher   31   lower  …      careful: any number that is still possible
      or  32   lower   16  higher   24   lower  …      halving: the middle of those that are still possible

One of the three plays a whole game. The reward of finding the number in few turns can teach to halve. Guesses are
messages of the assistant, and what the game answers are the user's, which are not imitated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from data import number_guess
from data.dataset import builds_dataset

DEFAULT_SIZE = {"train": 65_536, "eval": 1_024}
SKILL = (0.5, 0.35)

Message = dict[str, str]


def rows(
    split: number_guess.Split,
    size: int | None = None,
    seed: int = 0,
    *,
    skill: Sequence[float] = SKILL,
    low: int = 1,
    high: int = 63,
    max_turns: int = 8,
) -> list[dict[str, Any]]:
    """Rows of ``prompt`` and ``completion`` (messages) for the games of one split of ``data/number_guess.py``.

    ``skill`` is explained at ``trace``, the rest at ``number_guess.build``. Raises ValueError if they make no sense.
    """
    wanted = DEFAULT_SIZE.get(split) if size is None else size
    games = number_guess.rows(split, wanted, seed, low=low, high=high, max_turns=max_turns)
    found = []
    for i, game in enumerate(games):
        draw = random.Random(f"number_guess_traces/{seed}/{split}/{i}")
        completion = trace(game["secret"], draw, skill=skill, low=low, high=high, max_turns=max_turns)
        found.append({"prompt": game["prompt"], "completion": completion})
    return found


build = builds_dataset(rows)


def trace(
    secret: int,
    draw: random.Random,
    *,
    skill: Sequence[float] = SKILL,
    low: int = 1,
    high: int = 63,
    max_turns: int = 8,
) -> list[Message]:
    """One game. ``skill`` has the probabilities of a wild and of a careful player; else the player halves.

    Raises ValueError if ``skill`` makes no sense.
    """
    if len(skill) != 2 or min(skill) < 0 or sum(skill) > 1:
        raise ValueError(f"skill: {list(skill)} are not two chances that sum to at most 1")
    player = draw.choices(("wild", "careful", "halving"), [*skill, 1 - sum(skill)])[0]
    least, most, said = low, high, set[int]()
    messages: list[Message] = []
    for turn in range(1, max_turns + 1):
        if player == "wild":
            guess = draw.choice([number for number in range(low, high + 1) if number not in said])
        else:
            guess = (least + most) // 2 if player == "halving" else draw.randint(least, most)
        said.add(guess)
        messages.append({"role": "assistant", "content": str(guess)})
        if guess == secret or turn == max_turns:
            break
        messages.append({"role": "user", "content": "higher" if guess < secret else "lower"})
        least, most = (max(least, guess + 1), most) if guess < secret else (least, min(most, guess - 1))
    return messages
