"""The work of ``vs_trl``: prompts, lengths, rewards and settings, the same for both sides.

Standard library only: the trainer's scoring workers load this file for its rewards.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUESTION = (
    "Using the numbers {nums}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the "
    "final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
)
TURN = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"  # the model's chat template
REWARDS = {"same work": "alternating", "natural": "names_the_target"}


@dataclass(frozen=True)
class Case:
    """One row of the comparison. ``trl`` holds settings of TRL's GRPOConfig, ``ours`` sections of our recipe. Both
    override this file's settings."""

    model: str = "models/smollm2-135m"
    dtype: str = "float32"
    device: str = "cpu"
    row: str = "same work"
    prompts: int = 4
    generations: int = 8
    mean_length: int = 85
    max_length: int = 128
    steps: int = 64  # rows are made for this many; the controller stops earlier
    learning_rate: float = 1e-6
    trl: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)

    def lengths(self, step: int) -> list[int]:
        """Completion lengths of a step, prompt by prompt: evenly spread around their mean, shuffled anew each step."""
        samples = self.prompts * self.generations
        shortest = max(1, 2 * self.mean_length - self.max_length)
        spread = (self.max_length - shortest) / max(1, samples - 1)
        found = [round(shortest + i * spread) for i in range(samples)]
        random.Random(step).shuffle(found)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row for every prompt of every step, all different."""
        draw, found = random.Random(0), []
        for i in range(self.prompts * self.steps):
            nums, target = [draw.randint(1, 99) for _ in range(3)], 10 + i
            question = QUESTION.format(nums=nums, target=target)
            found.append({"prompt": TURN.format(question=question), "nums": nums, "target": target})
        return found

    def write_rows(self, folder: Path) -> Path:
        file = folder / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in self.rows()))
        return file


def alternating(completions: Sequence[str], **_: Any) -> list[float]:
    """1 and 0 in turn: every group has signal and every completion an advantage, whatever was sampled."""
    return [float(i % 2) for i in range(len(completions))]


def names_the_target(completions: Sequence[str], target: Sequence[int], **_: Any) -> list[float]:
    """1 if the completion contains the number that was asked for: rare for an untrained model, but not too rare."""
    return [
        float(re.search(rf"(?<!\d){t}(?!\d)", text) is not None) for text, t in zip(completions, target, strict=True)
    ]
