"""A task of your own: sums of two numbers, scored by the built-in reward ``math``.

    grpo train smoke_cpu data.name=examples/my_task.py:build 'data.args={largest: 9}' \
        'rewards=[{name: math}]' training.output_dir=runs/my_task

or, in a recipe, ``data: {name: my_task.py:build, args: {largest: 20}}``. Seconds on a CPU.

``build`` makes the rows of a split, ``train`` or ``eval``. ``prompt`` is the question; other columns go to the reward
functions (``math`` reads ``answer``). ``size`` None means all rows. No question may be in both splits.
"""

import random

from datasets import Dataset


def build(split, size=None, seed=0, *, largest=20):
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(1, largest + 1)]
    random.Random(seed).shuffle(pairs)
    held_out = [(a, b) for a, b in pairs if (a + 3 * b) % 4 == 0]  # by the question alone, whatever the seed
    chosen = held_out if split == "eval" else [pair for pair in pairs if pair not in held_out]
    if size is not None and size > len(chosen):
        raise ValueError(f"there are only {len(chosen)} {split} questions up to {largest}, {size} were asked for")
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in chosen[:size]]
    return Dataset.from_list(rows)
