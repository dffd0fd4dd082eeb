"""Curves as text, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

# The dots of a braille cell by column and row, as bits of the character behind U+2800.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def plot(
    xs: Sequence[float],
    ys: Sequence[float],
    width: int,
    height: int,
    *,
    right: float,
    top: float,
    ascii_only: bool = False,
) -> list[str]:
    """``height`` lines of ``width`` characters: ys over xs, both from 0, to ``right`` and ``top``.

    Braille has 2 by 4 dots in a character; ``ascii_only`` has one star. Neighbouring points are joined.
    """
    across, down = (1, 1) if ascii_only else (2, 4)
    columns, rows = width * across, height * down
    dots: set[tuple[int, int]] = set()
    before: tuple[int, int] | None = None
    for x, y in zip(xs, ys, strict=True):
        share = min(1.0, max(0.0, y / top)) if top > 0 else 0.0
        here = round(x / max(right, 1e-9) * (columns - 1)), round((1 - share) * (rows - 1))
        dots.update(_between(before or here, here))
        before = here
    cells = [[0] * width for _ in range(height)]
    for column, row in dots:
        cells[row // down][column // across] |= 1 if ascii_only else _DOTS[column % 2][row % 4]
    blank = " "
    if ascii_only:
        return ["".join("*" if cell else blank for cell in line) for line in cells]
    return ["".join(chr(0x2800 + cell) if cell else blank for cell in line) for line in cells]


def _between(one: tuple[int, int], other: tuple[int, int]) -> set[tuple[int, int]]:
    """The dots on the line from one to the other, both included."""
    count = max(abs(other[0] - one[0]), abs(other[1] - one[1]), 1)
    return {
        (
            round(one[0] + (other[0] - one[0]) * i / count),
            round(one[1] + (other[1] - one[1]) * i / count),
        )
        for i in range(count + 1)
    }


def nice(top: float) -> float:
    """The least of 1, 2, 2.5 and 5 times a power of ten that is not below ``top``: where an axis ends."""
    if top <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if top <= step * power * (1 + 1e-9))
