"""Word problems for tests: 30 written by hand, each a text of its own, and as many as one likes from templates."""

from __future__ import annotations

import random
from pathlib import Path

WRITTEN = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()

NAMES = ["Tom", "Ann", "Raj", "Mei", "Sven", "Aisha", "Luis", "Olga", "Kofi", "Yuki"]
THINGS = ["apples", "pencils", "stamps", "coins", "shells", "marbles", "stickers", "books"]
TEMPLATES = [
    "{a} has {x} {t} and buys {y} more at the fair. Then {a} gives {z} of them to {b}. How many {t} does {a} have "
    "left?",
    "Each of the {x} boxes in the cellar holds {y} {t}. {a} and {b} share them equally, and {z} are broken. How many "
    "sound {t} does {a} get?",
    "{a} collects {x} {t} a week. After {y} weeks {a} swaps {z} {t} with {b}. How many {t} are in the collection now?",
]


def from_templates(n: int, seed: int = 0) -> list[str]:
    """Different problems of a few templates, with names, things and numbers that vary."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        a, b = draw.sample(NAMES, 2)
        x, y, z = (draw.randrange(2, 90) for _ in range(3))
        found[draw.choice(TEMPLATES).format(a=a, b=b, t=draw.choice(THINGS), x=x, y=y, z=z)] = None
    return list(found)


def countdown(n: int, seed: int = 0) -> list[str]:
    """Prompts that share all words but their numbers."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        numbers, target = [draw.randrange(1, 20) for _ in range(3)], draw.randrange(1, 60)
        found[
            f"Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic "
            "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags."
        ] = None
    return list(found)
