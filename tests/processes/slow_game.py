"""A game whose answers take a moment and a draw, and that says in a file when it is at work on one."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any


class SlowGame:
    """The model is paid for the small numbers of each turn, until a die ends the game."""

    def __init__(self, folder: str):
        self.at_work = Path(folder) / "answers"

    def reset(self, nums: list[int], **row: Any) -> str | None:
        return f" {random.choice(nums)}" if random.random() < 0.5 else None  # so some prompts of a group differ

    def step(self, text: str) -> tuple[str, float, bool]:
        with self.at_work.open("a") as file:
            file.write("x")
        time.sleep(random.choice([0.0, 0.03]))
        small = sum(character in "12345" for character in text)
        return f" {random.randint(1, 9)} ", small / 8, random.random() < 0.3

    def get_reward(self) -> float:
        return random.random() / 8
