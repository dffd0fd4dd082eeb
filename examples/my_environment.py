"""An environment of your own: every turn of the model goes to ``step``, which answers it.

    grpo train smoke_cpu "rewards=[{name: environment}]" \
        "environment={path: examples/my_environment.py:Nearer, max_turns: 3, max_observation_length: 8}"

The model is to name the row's target. It hears whether its last number was too small or too large. A class with tools
in place of ``step`` is in docs/environments.md.
"""

import re


class Nearer:
    def reset(self, target: int, **row) -> None:
        """The row's columns come by name. A string that it returns is added to the prompt."""
        self.target, self.nearest = target, None

    def step(self, text: str) -> tuple[str, bool]:
        """What the model wrote in this turn; returns what it reads next, and whether the episode is over."""
        numbers = [int(number) for number in re.findall(r"[0-9]{1,6}", text)]
        if not numbers:
            return " give target ", False
        distance = abs(numbers[-1] - self.target)
        self.nearest = distance if self.nearest is None else min(self.nearest, distance)
        return (" < " if numbers[-1] < self.target else " > "), distance == 0

    def get_reward(self) -> float:
        """1 for the target, less the further off the nearest number was."""
        return 0.0 if self.nearest is None else 1 / (1 + self.nearest)
