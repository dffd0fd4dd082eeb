"""Shaping by length and repetition: pure functions of lengths and n-grams.

``rewards/overlong.py``, ``rewards/cosine.py`` and ``rewards/repetition.py`` hold the rewards that recipes name. Lengths
are in tokens, the end-of-sequence token included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence

SPACELESS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai to Khmer, kana, Han
UNIT = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+|[^\w\s]")


def ran_out(length: int, max_completion_length: int, status: str | None) -> bool:
    """Whether a completion was cut off. Its ``status`` says so; without one (TRL), reaching the limit does."""
    if status is None:
        return length >= max_completion_length
    return status == "length" or length > max_completion_length


def soft_overlong_punishment(length: int, max_completion_length: int, soft_punish_cache: int) -> float:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13) of a completion of ``length`` tokens, in [-1, 0].

        0                                      length <= L_max - L_cache
        (L_max - L_cache - length) / L_cache   in between
        -1                                     length > L_max

    ``max_completion_length`` is L_max. ``soft_punish_cache`` is L_cache, the tokens before L_max over which the
    punishment grows.

    Raises:
        ValueError: not 0 < L_cache <= L_max.
    """
    if not 0 < soft_punish_cache <= max_completion_length:
        raise ValueError(
            f"need 0 < soft_punish_cache <= max_completion_length, got {soft_punish_cache} and {max_completion_length}"
        )
    over = length - (max_completion_length - soft_punish_cache)
    return min(0.0, max(-1.0, -over / soft_punish_cache))


def cosine_between(length: int, max_length: int, at_zero: float, at_max: float) -> float:
    """``at_zero`` at length 0, ``at_max`` from ``max_length`` tokens on, a half cosine in between (CosFn of
    arXiv:2502.03373)."""
    progress = min(1.0, length / max_length)
    return at_max + 0.5 * (at_zero - at_max) * (1.0 + math.cos(math.pi * progress))


def repeated_share(units: Sequence[Hashable], ngram_size: int) -> float:
    """Share of n-grams that have occurred before: 1 - distinct / all, in [0, 1). Fewer than n units repeat nothing."""
    total = len(units) - ngram_size + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(units[start : start + ngram_size]) for start in range(total)}) / total


def units_of(text: str) -> list[str]:
    """Words and signs of a text in lower case, for n-grams where there are no tokens."""
    return UNIT.findall(text.lower())
