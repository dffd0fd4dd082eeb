"""Long and noisy series made short and smooth."""

from __future__ import annotations

import numpy as np


def smooth(values: np.ndarray) -> np.ndarray:
    """Centered moving mean over a twentieth of the run; short runs stay as they are."""
    width = len(values) // 20
    if width < 2:
        return values
    window = np.ones(2 * (width // 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def thinned(values: np.ndarray, most: int = 500) -> np.ndarray:
    """Means of neighbours along the last axis, so that a long run's picture has at most ``most`` points to a curve."""
    size = -(-values.shape[-1] // most)
    whole = values.shape[-1] // size * size
    return values[..., :whole].reshape(*values.shape[:-1], -1, size).mean(-1) if size > 1 else values
