"""Advantages by turn: the definition in plain loops, and by enumeration that their baseline has no bias."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import numpy as np
import pytest
import torch

from grpo.advantages import STD_OFFSET, step_advantages, turn_advantages, turn_returns
from grpo.config import AlgorithmConfig
from grpo.types import Completion, Episode, Group, Prompt, Status, Turn


def episode(*rewards: float | None, at_the_end: float | None = None, failed: bool = False) -> Completion:
    turns = [Turn(i, i + 1, "stop", reward) for i, reward in enumerate(rewards)]
    made = Episode(turns, at_the_end, failure="timeout" if failed else "")
    status = Status.ERROR if failed else Status.STOP
    return Completion(list(range(len(turns))), [-1.0] * len(turns), status, "", [], made)


def group(*completions: Completion) -> Group:
    rewards = [c.episode.total_reward() if c.episode else None for c in completions]
    return Group(Prompt(0, "", "", [1]), list(completions), rewards)


MADE = [
    group(episode(1.0, None, 0.5), episode(0.25), episode(None, 0.5, at_the_end=2.0), episode(1.0, failed=True)),
    group(episode(at_the_end=1.0), episode(0.0, at_the_end=1.0), episode(1.0, 1.0), episode(0.0)),
]
RETURNS = [
    [[1.5, 0.5, 0.5], [0.25, 0.0, 0.0], [2.5, 2.5, 0.0], None],
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
]


def test_a_turns_return_is_what_was_paid_from_it_on() -> None:
    returns_PGU, there_PGU = turn_returns(MADE, 2.0)
    for found_GU, expected in zip(returns_PGU, RETURNS, strict=True):
        for found_U, of_episode in zip(found_GU, expected, strict=True):
            assert np.isnan(found_U).all() if of_episode is None else found_U.tolist() == [2 * r for r in of_episode]
    assert there_PGU.sum(axis=2).tolist() == [[3, 1, 2, 1], [0, 1, 2, 1]]


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_agrees_with_plain_loops(scale: str, baseline: str) -> None:
    """A turn beside the same turn of all episodes of its group that were scored; those that had ended have 0."""
    algorithm = AlgorithmConfig(credit="turn", scale_rewards=scale, baseline=baseline)
    found_PGU = step_advantages(np.zeros((2, 4)), MADE, [1.0], algorithm)
    for found_GU, of_group, returns in zip(found_PGU, MADE, RETURNS, strict=True):
        scored = [r for r in returns if r is not None]
        for found_U, completion, own in zip(found_GU, of_group.completions, returns, strict=True):
            turns = len(completion.episode.turns) if completion.episode else 0
            for k in range(3):
                if own is None or k >= turns:
                    assert found_U[k] == 0
                    continue
                every = [r[k] for r in scored]
                a = own[k] - statistics.fmean(every)
                if baseline == "leave_one_out":
                    a = own[k] - (sum(every) - own[k]) / (len(every) - 1)
                if scale == "group":
                    a /= statistics.stdev(every) + STD_OFFSET
                assert found_U[k] == pytest.approx(a, abs=1e-12)


def test_without_turns_there_is_nothing_to_learn() -> None:
    nothing = [group(episode(at_the_end=1.0), episode(failed=True))]
    assert step_advantages(np.zeros((1, 2)), nothing, [1.0], AlgorithmConfig(credit="turn")).shape == (1, 2, 0)


# --- a toy in which everything can be enumerated: three turns, two actions; action 0 ends an episode in the first two

PAID = {(0,): 0.3, (1,): -0.2, (1, 0): 1.0, (1, 1): 0.1, (1, 1, 0): 0.7, (1, 1, 1): 2.0}  # by what was done so far
EPISODES = [(0,), (1, 0), (1, 1, 0), (1, 1, 1)]


def log_prob(logits_3: torch.Tensor, actions: tuple[int, ...], turn: int) -> torch.Tensor:
    return torch.nn.functional.logsigmoid(logits_3[turn] if actions[turn] else -logits_3[turn])


def chance(logits_3: torch.Tensor, actions: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([log_prob(logits_3, actions, turn) for turn in range(len(actions))]).sum().exp()


def rewards_of(actions: tuple[int, ...]) -> list[float]:
    return [PAID[actions[: turn + 1]] for turn in range(len(actions))]


@pytest.mark.parametrize(("baseline", "factor"), [("leave_one_out", 1.0), ("group", 2 / 3)])
def test_the_expected_gradient_is_that_of_the_expected_reward(baseline: str, factor: float) -> None:
    """Over all groups of three episodes. With the mean that includes an episode itself it is (G - 1) / G of it, the
    same for every turn, however few episodes come to that turn."""
    logits_3 = torch.tensor([0.4, -0.3, 0.9], dtype=torch.float64, requires_grad=True)
    value = sum(chance(logits_3, actions) * sum(rewards_of(actions)) for actions in EPISODES)
    (expected_3,) = torch.autograd.grad(value, logits_3)
    options: dict[str, Any] = {"scale_rewards": "none", "baseline": baseline}
    found_3 = torch.zeros(3, dtype=torch.float64)
    for of_group in itertools.product(EPISODES, repeat=3):
        advantages_1GU = turn_advantages(
            *turn_returns([group(*(episode(*rewards_of(a)) for a in of_group))]), **options
        )
        surrogate = sum(
            advantages_1GU[0, g, turn] * log_prob(logits_3, actions, turn)
            for g, actions in enumerate(of_group)
            for turn in range(len(actions))
        )
        (gradient_3,) = torch.autograd.grad(surrogate / 3, logits_3)
        weight = float(torch.stack([chance(logits_3.detach(), actions) for actions in of_group]).prod())
        found_3 += weight * gradient_3
    assert found_3 == pytest.approx((factor * expected_3).numpy(), abs=1e-12)
