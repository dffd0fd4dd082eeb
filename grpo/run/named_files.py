"""The files that a recipe names beside its model: code of the user's own, and what rewards read. Nothing of torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from grpo import user_code
from grpo.config import Recipe, RewardConfig


def code_files(recipe: Recipe) -> dict[str, Path]:
    """The files of the user's rewards, environment, tools, loss and backend. What makes rows is not among them: the
    rows are."""
    places = {f"{_key(reward, i)}.path": reward.path for i, reward in enumerate(recipe.functions()) if reward.path}
    places |= environment_places(recipe)
    places |= {"algorithm.loss_type": recipe.algorithm.loss_type, "rollout.backend": recipe.rollout.backend}
    return {
        f"{key}: {name}": file
        for key, place in places.items()
        if user_code.is_place(place)
        for name, file in user_code.sources_of(place, key).items()
    }


def environment_places(recipe: Recipe) -> dict[str, str]:
    """The keys of an environment and tools of the user's own, with their places."""
    environment = recipe.environment
    if environment is None:
        return {}
    own = {"environment.path": environment.path} if environment.path else {}
    return own | {f"environment.tools.{i}": place for i, place in enumerate(environment.tools)}


def files_in_args(recipe: Recipe) -> dict[str, Path]:
    """The files that arguments of rewards and of an environment name: a list of words, say, or answers."""
    args = {_key(reward, i): reward.args for i, reward in enumerate(recipe.functions())}
    args |= {"environment": recipe.environment.args} if recipe.environment is not None else {}
    return {
        f"{where}.args.{key}": Path(value).expanduser()
        for where, of in args.items()
        for key, value in of.items()
        if isinstance(value, str) and _is_file(value)
    }


def _key(reward: RewardConfig, index: int) -> str:
    return reward.where(index).replace("[", ".").replace("]", "")


def _is_file(text: str) -> bool:
    with suppress(OSError, ValueError):  # too long for a path, or not one
        return Path(text).expanduser().is_file()
    return False
