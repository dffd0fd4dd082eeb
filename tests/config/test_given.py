"""What of a recipe is no default, also of one that this version would refuse."""

from __future__ import annotations

from grpo.config.given import given


def test_a_setting_is_given_where_it_is_no_default_known_or_not():
    recipe = {
        "stage": "grpo",
        "rewards": [{"name": "countdown", "weight": 1.0}, {"name": "format", "weight": 0.1}, 3],
        "rollout": {"temperature": 1.0, "num_generations": 4, "of_a_later_version": {"a": 1}},
        "model": {"name": "x", "lora": {"r": 5}},
        "data": [1],
        7: 8,
    }
    assert given(recipe) == {
        "rewards.0.name": "countdown",
        "rewards.1.name": "format",
        "rewards.1.weight": 0.1,
        "rewards.2": 3,
        "rollout.num_generations": 4,
        "rollout.of_a_later_version": {"a": 1},
        "model.name": "x",
        "model.lora.r": 5,
        "data.0": 1,
        "7": 8,
    }
