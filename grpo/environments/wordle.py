"""Wordle: the model guesses a hidden word of five letters, and hears of each letter whether it is right."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from data.wordle import WORDS
from grpo.environments.calls import behind_thinking

RIGHT, ELSEWHERE, ABSENT = "G", "Y", "-"


class Wordle:
    """Guess the row's ``secret`` in ``max_turns`` turns (the row's, or `environment.args`).

    **Reward.** 1 where the word is found, 0 where not; with ``faster: true`` the first turn gets 1, and each later one
    an equal share less, down to 1/2 for the last.

    A turn's guess is the last word of five letters in its text, after the thinking. It must be one of the list
    (``words``: a list of your own, in place of the one of ``data/wordle.py``). Another is answered by an error and
    counts as a turn.
    """

    def __init__(self, *, max_turns: int = 6, words: list[str] | None = None, faster: bool = False) -> None:
        self.own_max_turns, self.faster = max_turns, faster
        self.words = frozenset(word.lower() for word in (WORDS if words is None else words))
        if wrong := [word for word in self.words if not re.fullmatch("[a-z]{5}", word)]:
            raise ValueError(f"words: {wrong[0]!r} is not made of five letters a to z")

    def reset(self, secret: str = "", max_turns: int | None = None, **row: Any) -> None:
        self.secret, self.max_turns = str(secret).lower(), max_turns or self.own_max_turns
        if self.secret not in self.words:
            raise ValueError(f"the row's column secret must be one of the words, it is {secret!r}")
        self.turns, self.found = 0, False

    def step(self, text: str) -> tuple[str, bool]:
        self.turns += 1
        said = re.findall("(?<![a-z])[a-z]{5}(?![a-z])", behind_thinking(text).lower())
        if not said:
            answer = "error: say a word of five letters"
        elif said[-1] not in self.words:
            answer = f"error: {said[-1]} is not in the list of words"
        else:
            self.found = said[-1] == self.secret
            answer = f"{' '.join(said[-1])}\n{' '.join(marks(said[-1], self.secret))}"
        return answer, self.found or self.turns >= self.max_turns

    def get_reward(self) -> float:
        if not self.found:
            return 0.0
        return 1 - 0.5 * (self.turns - 1) / max(1, self.max_turns - 1) if self.faster else 1.0


def marks(guess: str, secret: str) -> str:
    """Of each letter of ``guess`` whether it is right, elsewhere or absent. A letter that is there once is marked once:
    letters in their place count first, then others from the left."""
    left = Counter(there for said, there in zip(guess, secret, strict=True) if said != there)
    found = []
    for said, there in zip(guess, secret, strict=True):
        if said == there:
            found.append(RIGHT)
        elif left[said] > 0:
            left[said] -= 1
            found.append(ELSEWHERE)
        else:
            found.append(ABSENT)
    return "".join(found)


def play(row: dict[str, Any]) -> list[str]:
    """The turns of one who knows the word, for the audit."""
    return [str(row["secret"])]
