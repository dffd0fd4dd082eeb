"""The files that a recipe names beside its model: code of the user's own, and what rewards read. Nothing of torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from grpo import user_code
from grpo.config import Recipe, RewardConfig


def code_files(recipe: Recipe) -> dict[str, Path]:
    """The files of the user's rewards, loss and backend. What makes rows is not among them: the rows are."""
    places = {f"{_key(reward, i)}.path": reward.path for i, reward in enumerate(recipe.functions()) if reward.path}
    places |= {"algorithm.loss_type": recipe.algorithm.loss_type, "rollout.backend": recipe.rollout.backend}
    return {
        f"{key}: {name}": file
        for key, place in places.items()
        if user_code.is_place(place)
        for name, file in user_code.sources_of(place, key).items()
    }


def files_in_args(recipe: Recipe) -> dict[str, Path]:
    """The files that arguments of rewards name: a list of words, say, or answers."""
    return {
        f"{_key(reward, i)}.args.{key}": Path(value).expanduser()
        for i, reward in enumerate(recipe.functions())
        for key, value in reward.args.items()
        if isinstance(value, str) and _is_file(value)
    }


def _key(reward: RewardConfig, index: int) -> str:
    return reward.where(index).replace("[", ".").replace("]", "")


def _is_file(text: str) -> bool:
    with suppress(OSError, ValueError):  # too long for a path, or not one
        return Path(text).expanduser().is_file()
    return False
