"""Every random draw is a pure function of its key: no generator has a state that a restart could lose.

A token of a completion is drawn with one uniform number that depends on (seed, stream, step, prompt id, sample index,
token position) and on nothing else: not on the batch it shared, the process that made it, or what was drawn before.
"""

from __future__ import annotations

import hashlib
from enum import Enum

import numpy as np


class Stream(str, Enum):
    """Names of independent sequences of draws, so that no two purposes ever share one."""

    ROLLOUT = "rollout"
    EVALUATION = "evaluation"
    SAMPLE = "sample"
    PROBE = "probe"
    DATA_ORDER = "data order"
    DATA_SPLIT = "data split"
    CURRICULUM = "curriculum"
    MIX = "mix"
    ADAPTERS = "adapters"
    DROPOUT = "dropout"


# Weyl increment and the two multipliers of SplitMix64 (Steele, Lea & Flood 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key(*parts: int | str) -> int:
    """A 64-bit key of any tuple of integers and strings; the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def uniforms(keys_B: list[int], positions: np.ndarray) -> np.ndarray:
    """One uniform number in [0, 1) for each key and token position, as float64 (B,T) in multiples of 2**-32.

    ``positions`` are (T,), the same for every key, or (B,T).

    Counter-based: the number at (key, position) is SplitMix64's finalizer of ``key + (position + 1) * golden ratio``.
    32 bits leave room for ``u * total < total`` to hold exactly in float64 when the sampler inverts a cumulative sum.
    """
    keys_B1 = np.asarray(keys_B, dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):
        x_BT = keys_B1 + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        x_BT = (x_BT ^ (x_BT >> np.uint64(30))) * _MIX_1
        x_BT = (x_BT ^ (x_BT >> np.uint64(27))) * _MIX_2
        x_BT ^= x_BT >> np.uint64(31)
    return (x_BT >> np.uint64(32)).astype(np.float64) * 2.0**-32


def permutation(seed: int, stream: Stream, epoch: int, n: int) -> np.ndarray:
    """A permutation of ``range(n)`` computed from its key alone."""
    return np.random.Generator(np.random.Philox(key=key(seed, stream.value, epoch))).permutation(n)
