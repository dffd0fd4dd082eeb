"""Rewards (P,G) to advantages (P,G): how much better a completion is than the others of its group. With
``algorithm.credit: turn`` an episode has an advantage for each of its U turns, (P,G,U).

GRPO (DeepSeekMath, arXiv:2402.03300, eq. 3): A = (r - mean(r)) / std(r), over the group. A reward of NaN means "could
not be scored": it is left out of every mean and deviation, and its advantage is 0. ``step_advantages`` is what the
recipe asks for; the functions below it are the formulas.
"""

from __future__ import annotations

import math

import numpy as np

from grpo.config import AlgorithmConfig
from grpo.types import Group

STD_OFFSET = 1e-4  # TRL's; keeps a nearly constant group from exploding


def step_advantages(
    rewards_PG: np.ndarray, groups: list[Group], weights_F: list[float], algorithm: AlgorithmConfig
) -> np.ndarray:
    """Advantages (P,G) of scored groups, or (P,G,U) with ``credit: turn``. ``rewards_PG`` are the groups' rewards
    (``rewards_array``), ``weights_F`` the weights of the reward functions, in the recipe's order."""
    if algorithm.multi_objective_aggregation == "normalize_then_sum":
        return normalize_then_sum(rewards_by_function(groups), weights_F)
    how = {"scale_rewards": algorithm.scale_rewards, "baseline": algorithm.baseline}
    if algorithm.credit == "turn":
        returns_PGU, there_PGU = turn_returns(groups, *weights_F)
        return turn_advantages(returns_PGU, there_PGU, **how)
    if algorithm.pass_at_k is not None:
        return pass_at_k_advantages(rewards_PG, algorithm.pass_at_k, **how)
    return group_advantages(rewards_PG, **how)


def rewards_array(groups: list[Group]) -> np.ndarray:
    """Rewards (P,G) as float64, NaN where a completion could not be scored."""
    return np.array([[np.nan if r is None else r for r in group.rewards] for group in groups], dtype=np.float64)


def rewards_by_function(groups: list[Group]) -> np.ndarray:
    """What each of F reward functions gave, (P,G,F), before weights; NaN where it could not score a completion."""
    values_PFG = [list(group.rewards_by_function.values()) for group in groups]
    return np.moveaxis(np.array(values_PFG, dtype=np.float64), 1, 2)  # numpy reads None as NaN


def turn_returns(groups: list[Group], weight: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """What each turn of an episode led to, (P,G,U), and which turns there were, (P,G,U) of bool.

    The return of a turn is the sum of the environment's rewards from that turn on, times ``weight``; what it pays in
    the end counts with the last turn. It is 0 for turns that an episode did not come to, and NaN at all turns of one
    that could not be scored. U is the most turns of any.
    """
    episodes = [[c.episode for c in group.completions] for group in groups]
    of_turns = [[episode.returns() if episode else [] for episode in of_group] for of_group in episodes]
    U = max((len(returns) for of_group in of_turns for returns in of_group), default=0)
    returns_PGU = np.array([[[*of, *[0.0] * (U - len(of))] for of in of_group] for of_group in of_turns])
    turns_PG1 = np.array([[[len(of)] for of in of_group] for of_group in of_turns])
    scored_PG = ~np.isnan(rewards_array(groups))
    return np.where(scored_PG[..., None], weight * returns_PGU, np.nan), np.arange(U) < turns_PG1


def turn_advantages(
    returns_PGU: np.ndarray, there_PGU: np.ndarray, *, scale_rewards: str = "group", baseline: str = "group"
) -> np.ndarray:
    """Advantages (P,G,U) of what turns led to (``turn_returns``): those of ``group_advantages``, turn by turn.

    A turn is compared with the same turn of *all* episodes of its group, those that had ended before it with a return
    of 0. So every turn is compared with as many, and the mean that includes an episode itself scales the whole gradient
    by (G - 1) / G, as GRPO's does; ``leave_one_out`` has no bias. A mean over the episodes that came to the turn would
    scale each turn by another factor. MT-GRPO (arXiv:2505.11821) instead normalizes the rewards of each turn and of the
    outcome apart and adds them; GiGPO (arXiv:2505.10978) compares turns that begin in the same state, and adds that to
    the advantage of the episode.
    """
    of_turns = [
        group_advantages(returns_PG, scale_rewards=scale_rewards, baseline=baseline)
        for returns_PG in np.moveaxis(returns_PGU, 2, 0)
    ]
    if not of_turns:
        return np.zeros(np.shape(returns_PGU))
    return np.where(there_PGU, np.stack(of_turns, axis=2), 0.0)


def group_advantages(rewards_PG: np.ndarray, *, scale_rewards: str = "group", baseline: str = "group") -> np.ndarray:
    """Advantages (P,G) of rewards (P,G), both float64; NaN marks a completion that could not be scored.

    ``baseline``: ``group`` subtracts the group's mean (GRPO); ``leave_one_out`` the mean of the *other* completions
    (RLOO, arXiv:2402.14740), which is the same times n / (n - 1); ``batch`` the mean of all rewards of the step
    (REINFORCE++, arXiv:2501.03262); ``none`` nothing (REINFORCE).
    ``scale_rewards``: ``group`` divides by the group's standard deviation (GRPO), ``batch`` by that of all rewards of
    the step (arXiv:2508.08221; with ``baseline: group`` also REINFORCE++-baseline), ``none`` by nothing (Dr. GRPO,
    arXiv:2503.20783). Deviations are over n - 1, and STD_OFFSET is added to them. Equal rewards have no deviation, so
    they must be 0 after the baseline where one divides by it: ``scale_rewards: group`` needs the baseline ``group`` or
    ``leave_one_out``, ``batch`` any but ``none``.

    A group whose rewards are all equal gets exactly 0 with the baselines ``group`` and ``leave_one_out``, whatever the
    rounding of its mean. With ``batch``, only a step whose rewards are all equal does.
    """
    rewards_PG = np.asarray(rewards_PG, dtype=np.float64)
    scored_PG = ~np.isnan(rewards_PG)
    step_1S, scored_1S = rewards_PG.reshape(1, -1), scored_PG.reshape(1, -1)
    count_P1 = scored_PG.sum(axis=1, keepdims=True)
    silent_P = zero_std(rewards_PG)
    if baseline in ("group", "leave_one_out"):
        centered_PG = rewards_PG - _mean_P1(rewards_PG, scored_PG)
        if baseline == "leave_one_out":
            centered_PG = centered_PG * count_P1 / np.maximum(count_P1 - 1, 1)
    elif baseline == "batch":
        centered_PG = rewards_PG - _mean_P1(step_1S, scored_1S)
        silent_P = np.repeat(zero_std(step_1S), len(rewards_PG))
    elif baseline == "none":
        centered_PG, silent_P = rewards_PG, np.zeros(len(rewards_PG), dtype=bool)
    else:
        raise ValueError(f"baseline is 'group', 'leave_one_out', 'batch' or 'none', not {baseline!r}")

    if (scale_rewards, baseline) in (("group", "batch"), ("group", "none"), ("batch", "none")):
        raise ValueError(f"scale_rewards {scale_rewards!r} does not go with baseline {baseline!r}")
    if scale_rewards == "group":
        advantages_PG = centered_PG / (_std_P1(rewards_PG, scored_PG) + STD_OFFSET)
    elif scale_rewards == "batch":
        advantages_PG = centered_PG / (_std_P1(step_1S, scored_1S) + STD_OFFSET)
    elif scale_rewards == "none":
        advantages_PG = centered_PG
    else:
        raise ValueError(f"scale_rewards is 'group', 'batch' or 'none', not {scale_rewards!r}")
    return np.where(scored_PG & ~silent_P[:, None], advantages_PG, 0.0)


def normalize_then_sum(rewards_PGF: np.ndarray, weights_F: list[float]) -> np.ndarray:
    """GDPO's advantages (P,G) of what F reward functions gave, (P,G,F) (arXiv:2601.05242).

    Each function is normalized within its group, so that none drowns another: a_f = (r_f - mean(r_f)) / std(r_f) over
    the group's completions that it scored. Then A = (s - mean(s)) / std(s) of the sums s = sum_f w_f a_f, over all
    scored completions of the step. This is TRL's formula: deviations are over n - 1, plus STD_OFFSET. A function whose
    rewards in a group are all equal adds exactly 0 there; a group whose sums are all equal gets exactly 0.
    """
    P, G, F = rewards_PGF.shape
    rewards_KG = np.moveaxis(np.asarray(rewards_PGF, dtype=np.float64), 2, 1).reshape(P * F, G)
    parts_PFG = group_advantages(rewards_KG).reshape(P, F, G)  # 0 where not scored: it adds nothing
    sums_PG = np.einsum("pfg,f->pg", parts_PFG, np.asarray(weights_F, dtype=np.float64))
    sums_PG = np.where(np.isnan(rewards_PGF).all(axis=2), np.nan, sums_PG)
    advantages_PG = group_advantages(sums_PG, scale_rewards="batch", baseline="batch")
    return np.where(zero_std(sums_PG)[:, None], 0.0, advantages_PG)


def pass_at_k_advantages(
    rewards_PG: np.ndarray, k: int, *, scale_rewards: str = "group", baseline: str = "group"
) -> np.ndarray:
    """Advantages (P,G) for the best of k completions instead of their mean (Pass@k Training, arXiv:2508.10751).

    Over all subsets S of k of a group's n scored completions, with f(S) the best reward in S: A_i = (mean of f over the
    S that contain i - mean of f) / std of f. Means and std are computed exactly, not sampled. With rewards of 0 and 1,
    m of them 0, these are the paper's analytic advantages (eq. 14, 15): mean f is 1 - C(m, k) / C(n, k); over the S
    that contain an i of reward 1 it is 1, and over those with an i of reward 0 it is
    1 - C(m - 1, k - 1) / C(n - 1, k - 1). Differences from the paper: rewards need not be 0 or 1; STD_OFFSET is added
    to std f; k = 1 divides by the deviation over n, where GRPO's is over n - 1.

    ``scale_rewards``: ``group``, or ``none`` not to divide. ``baseline``: ``group``, or ``leave_one_out``, the mean of
    f over the S *without* i, which is the same times n / (n - k). Unscaled, mean_i(A_i grad log pi_i) then has the
    expectation grad E[f] / k; with ``group`` it is (1 - k / n) times that. A group of k scored completions or fewer has
    no signal, and gets 0.
    """
    if scale_rewards not in ("group", "none"):
        raise ValueError(f"scale_rewards with pass_at_k is 'group' or 'none', not {scale_rewards!r}")
    if baseline not in ("group", "leave_one_out"):
        raise ValueError(f"baseline with pass_at_k is 'group' or 'leave_one_out', not {baseline!r}")
    advantages_PG = np.zeros(np.shape(rewards_PG))
    for p, rewards_G in enumerate(np.asarray(rewards_PG, dtype=np.float64)):
        scored_G = ~np.isnan(rewards_G)
        n = int(scored_G.sum())
        if n <= k:
            continue
        centered_n, std = _best_of_k(rewards_G[scored_G], k)
        if baseline == "leave_one_out":
            centered_n = centered_n * n / (n - k)
        advantages_PG[p, scored_G] = centered_n / (std + STD_OFFSET) if scale_rewards == "group" else centered_n
    return advantages_PG


def _best_of_k(rewards_n: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """For each of n rewards: the mean best of the k-subsets that contain it, minus that of all k-subsets. And the
    standard deviation of the best.

    Rewards are taken relative to the highest, so that a group whose every k-subset contains it gets exact zeros.
    """
    n = len(rewards_n)
    below_n = rewards_n - rewards_n.max()
    order_n = np.argsort(below_n, kind="stable")
    ranked_n = below_n[order_n]
    chance_n = np.array([math.comb(j, k - 1) / math.comb(n, k) for j in range(n)])  # that the j-th lowest is the best
    mean = float((ranked_n * chance_n).sum())
    variance = float((ranked_n**2 * chance_n).sum()) - mean**2
    with_it_n = below_n.copy()
    if k > 1:
        chance_others = np.array([math.comb(j, k - 2) / math.comb(n - 1, k - 1) for j in range(n - 1)])
        for rank, i in enumerate(order_n):
            with_it_n[i] = (np.maximum(np.delete(ranked_n, rank), below_n[i]) * chance_others).sum()
    return with_it_n - mean, math.sqrt(max(variance, 0.0))


def zero_std(rewards_PG: np.ndarray) -> np.ndarray:
    """Which groups (P,) carry no signal: all their scored rewards are equal, or fewer than two are scored."""
    scored_PG = ~np.isnan(rewards_PG)
    highest_P = np.where(scored_PG, rewards_PG, -np.inf).max(axis=1)
    lowest_P = np.where(scored_PG, rewards_PG, np.inf).min(axis=1)
    return (highest_P == lowest_P) | (scored_PG.sum(axis=1) < 2)


def _mean_P1(values_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    count_P1 = scored_PG.sum(axis=1, keepdims=True)
    return np.where(scored_PG, values_PG, 0.0).sum(axis=1, keepdims=True) / np.maximum(count_P1, 1)


def _std_P1(values_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """Sample standard deviation (n - 1, as TRL and verl); 0 where fewer than two are scored."""
    centered_PG = np.where(scored_PG, values_PG - _mean_P1(values_PG, scored_PG), 0.0)
    count_P1 = scored_PG.sum(axis=1, keepdims=True)
    return np.sqrt((centered_PG**2).sum(axis=1, keepdims=True) / np.maximum(count_P1 - 1, 1))
