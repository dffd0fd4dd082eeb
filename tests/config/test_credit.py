"""`algorithm.credit: turn`: what it goes with, and what is refused, in words. And the reward `environment`."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from grpo.config import Recipe

BASE = {"model": {"name": "m"}, "data": {"name": "countdown"}, "training": {"output_dir": "x"}}
GAME = {"environment": {"name": "number_guess"}}
MIX = {"data": {"name": None, "mix": [{"name": "countdown", "rewards": [{"name": "countdown"}]}, {"name": "gsm8k"}]}}


def recipe(algorithm: dict[str, Any], **sections: Any) -> Recipe:
    return Recipe.model_validate(BASE | GAME | {"algorithm": {"credit": "turn"} | algorithm} | sections)


def said(algorithm: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        recipe(algorithm, **sections)
    return str(caught.value)


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"loss_type": "reinforce_pp"},  # its KL in the reward is none with beta 0
        {"loss_type": "kl_cov"},
        {"loss_type": "sapo", "baseline": "leave_one_out", "scale_rewards": "none"},
        {"importance_sampling_level": "sequence_token"},
        {"beta": 0.1, "top_entropy_quantile": 0.2, "num_iterations": 2},
        {"loss_type": "mine.py:loss"},  # one that asks for one advantage a completion says so when it is called
    ],
    ids=str,
)
def test_it_goes_with_losses_of_tokens(algorithm: dict[str, Any]) -> None:
    assert recipe(algorithm).algorithm.credit == "turn"
    assert recipe(algorithm, rewards=[{"name": "environment", "weight": 0.5}]).reward_names() == ["environment"]


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"loss_type": "gspo"}, "gspo cannot be used with credit: turn"),
        ({"loss_type": "luspo"}, "luspo cannot be used with credit: turn"),
        ({"loss_type": "rloo"}, "rloo cannot be used with credit: turn"),
        ({"loss_type": "vespo"}, "it weighs an episode as a whole"),
        ({"importance_sampling_level": "sequence"}, "its ratio is the episode's. sequence_token can"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold cannot be used with credit: turn"),
        ({"pass_at_k": 2}, "pass_at_k cannot be used with credit: turn"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "the environment's alone are by turn"),
        ({"kl_in_reward": True, "beta": 0.1}, "kl_in_reward cannot be used with credit: turn"),
    ],
)
def test_what_is_of_whole_episodes_is_refused(algorithm: dict[str, Any], message: str) -> None:
    assert message in said(algorithm)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"environment": None, "rewards": [{"name": "countdown"}]}, "and the recipe has no environment"),
        ({"rewards": [{"name": "countdown"}]}, "it must be the one reward, without countdown"),
        ({"rewards": [{"name": "environment"}, {"name": "format"}]}, "it must be the one reward, without format"),
        (MIX, "with data.mix sources have rewards of their own"),
    ],
)
def test_it_needs_the_rewards_of_an_environment_alone(sections: dict[str, Any], message: str) -> None:
    assert message in said({}, **sections)


def test_the_reward_environment_takes_no_arguments_of_its_own() -> None:
    assert "what its class takes is environment.args" in said({}, rewards=[{"name": "environment", "args": {"low": 1}}])
