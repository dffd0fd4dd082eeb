"""Rewards (P,G) to advantages (P,G): how much better a completion is than the others of its group.

GRPO (DeepSeekMath, arXiv:2402.03300, eq. 3): A = (r - mean(r)) / std(r), over the group. A reward of NaN means "could
not be scored": it is left out of every mean and deviation, and its advantage is 0.
"""

from __future__ import annotations

import numpy as np

STD_OFFSET = 1e-4  # TRL's; keeps a nearly constant group from exploding


def _mean_P1(values_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    count_P1 = scored_PG.sum(axis=1, keepdims=True)
    return np.where(scored_PG, values_PG, 0.0).sum(axis=1, keepdims=True) / np.maximum(count_P1, 1)


def _std_P1(values_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """Sample standard deviation (n - 1, as TRL and verl); 0 where fewer than two are scored."""
    centered_PG = np.where(scored_PG, values_PG - _mean_P1(values_PG, scored_PG), 0.0)
    count_P1 = scored_PG.sum(axis=1, keepdims=True)
    return np.sqrt((centered_PG**2).sum(axis=1, keepdims=True) / np.maximum(count_P1 - 1, 1))


def group_advantages(rewards_PG: np.ndarray, *, scale_rewards: str = "group", baseline: str = "group") -> np.ndarray:
    """Advantages (P,G) of rewards (P,G), both float64; NaN marks a completion that could not be scored.

    ``baseline``: ``group`` subtracts the group's mean; ``leave_one_out`` the mean of the *other* completions (RLOO,
    arXiv:2402.14740), which is the same times n / (n - 1).
    ``scale_rewards``: ``group`` divides by the group's standard deviation (GRPO), ``batch`` by that of all rewards of
    the step (REINFORCE++, arXiv:2508.08221), ``none`` by nothing (Dr. GRPO, arXiv:2503.20783).

    A group whose rewards are all equal gets exactly 0, whatever the rounding of its mean.
    """
    rewards_PG = np.asarray(rewards_PG, dtype=np.float64)
    scored_PG = ~np.isnan(rewards_PG)
    centered_PG = rewards_PG - _mean_P1(rewards_PG, scored_PG)
    count_P1 = scored_PG.sum(axis=1, keepdims=True)
    if baseline == "leave_one_out":
        centered_PG = centered_PG * count_P1 / np.maximum(count_P1 - 1, 1)
    elif baseline != "group":
        raise ValueError(f"baseline is 'group' or 'leave_one_out', not {baseline!r}")

    if scale_rewards == "group":
        advantages_PG = centered_PG / (_std_P1(rewards_PG, scored_PG) + STD_OFFSET)
    elif scale_rewards == "batch":
        advantages_PG = centered_PG / (_std_P1(rewards_PG.reshape(1, -1), scored_PG.reshape(1, -1)) + STD_OFFSET)
    elif scale_rewards == "none":
        advantages_PG = centered_PG
    else:
        raise ValueError(f"scale_rewards is 'group', 'batch' or 'none', not {scale_rewards!r}")
    return np.where(scored_PG & ~zero_std(rewards_PG)[:, None], advantages_PG, 0.0)


def zero_std(rewards_PG: np.ndarray) -> np.ndarray:
    """Which groups (P,) carry no signal: all their scored rewards are equal, or fewer than two are scored."""
    scored_PG = ~np.isnan(rewards_PG)
    highest_P = np.where(scored_PG, rewards_PG, -np.inf).max(axis=1)
    lowest_P = np.where(scored_PG, rewards_PG, np.inf).min(axis=1)
    return (highest_P == lowest_P) | (scored_PG.sum(axis=1) < 2)
