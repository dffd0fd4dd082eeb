"""The game of guessing a number: the model says one, and hears whether the secret is higher or lower.

The optimum is to halve: with 63 numbers, 6 turns find any secret, and 5.1 do on average. Nothing else finds all 63 in
6 turns.
"""

from __future__ import annotations

import re
from typing import Any

from grpo.environments.calls import behind_thinking

NUMBER = re.compile(r"(?<![\d.])-?\d{1,9}(?![\d.]*\d)")
"""An integer of a person's size; of 3.5 neither part is one."""


class NumberGuess:
    """Guess ``secret``, an integer from ``low`` to ``high``. These, and ``max_turns``, come from the row; where it has
    none, from ``environment.args``.

    **Reward.** 1 where the secret is found within the optimum, the turns that halving needs for any secret (6 for 1 to
    63). Of the turns left to ``max_turns`` behind the optimum each costs an equal share: with 8 turns, 2/3 for the 7th
    and 1/3 for the 8th. 0 where it is not found. With ``every_turn: true`` a turn is paid by itself: the share of
    the numbers still possible that it ruled out (1/2 for halving), and 1 for the secret.

    A turn's guess is the last number in its text, after the thinking. A turn without one from ``low`` to ``high`` is
    answered by an error and counts.
    """

    def __init__(self, *, low: int = 1, high: int = 63, max_turns: int = 8, every_turn: bool = False) -> None:
        if not 0 <= low < high:
            raise ValueError(f"low and high: need integers, 0 <= low < high, got {low} and {high}")
        self.own = {"low": low, "high": high, "max_turns": max_turns}
        self.every_turn = every_turn

    def reset(self, secret: Any = None, **row: Any) -> None:
        said = {name: row[name] if row.get(name) is not None else self.own[name] for name in self.own}
        self.low, self.high, self.max_turns = (int(said[name]) for name in ("low", "high", "max_turns"))
        if secret is None or not self.low <= int(secret) <= self.high:
            raise ValueError(f"the row's column secret must be from {self.low} to {self.high}, it is {secret!r}")
        self.secret, self.turns, self.found = int(secret), 0, False
        self.possible = (self.low, self.high)

    def step(self, text: str) -> tuple[str, bool] | tuple[str, float, bool]:
        self.turns += 1
        said = NUMBER.findall(behind_thinking(text))
        guess = int(said[-1]) if said else None
        if guess is None or not self.low <= guess <= self.high:
            return self._answer(f"error: say a number from {self.low} to {self.high}", 0.0)
        if guess == self.secret:
            self.found = True
            return self._answer(f"found in {self.turns} turns", 1.0)
        low, high = self.possible
        left = (max(low, guess + 1), high) if guess < self.secret else (low, min(high, guess - 1))
        ruled_out = 1 - (left[1] - left[0] + 1) / (high - low + 1)
        self.possible = left
        return self._answer("higher" if guess < self.secret else "lower", ruled_out)

    def _answer(self, text: str, reward: float) -> tuple[str, bool] | tuple[str, float, bool]:
        done = self.found or self.turns >= self.max_turns
        return (text, reward, done) if self.every_turn else (text, done)

    def get_reward(self) -> float:
        optimum = (self.high - self.low + 1).bit_length()
        late = max(0, self.turns - optimum)
        return 1 - late / (self.max_turns - optimum + 1) if self.found else 0.0


def play(row: dict[str, Any]) -> list[str]:
    """The turns of a player who halves, for the audit."""
    low, high, secret = row.get("low") or 1, row.get("high") or 63, row["secret"]
    turns: list[str] = []
    while True:
        guess = (low + high) // 2
        turns.append(str(guess))
        if guess == secret:
            return turns
        low, high = (guess + 1, high) if guess < secret else (low, guess - 1)
