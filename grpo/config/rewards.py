"""The recipe's list ``rewards``, and the rewards that a source of ``data.mix`` has of its own."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from grpo.config.base import Finite, LocalPath, Positive, Problem, Section, refuse

ENVIRONMENT = "environment"
"""The reward that an environment pays."""


class RewardConfig(Section):
    name: str | None = None
    """A built-in reward: `countdown`, `gsm8k`, `math`, `code`, `similarity` judge the answer, `format` the form,
    `overlong`, `cosine`, `repetition`, `language` shape; docs/rewards.md describes them. `environment` is what the
    recipe's `environment` pays."""
    path: LocalPath | None = None
    """A function of yours: `my_rewards.py:fn` or `package.module:fn`."""
    weight: Finite = 1.0
    """Factor in the sum of rewards."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Extra keyword arguments for every call."""
    timeout: Positive | None = None
    """Seconds one call may take; null takes `scoring.timeout`."""
    needs_group: bool = False
    """The function compares completions of a group: never split it, a failure costs the whole group."""
    shaping: bool = False
    """With `path`: the function judges no answer but shapes (length, style, effort), so `grpo audit` asks nothing of
    it. A built-in reward says this itself."""

    @model_validator(mode="after")
    def _one_function(self) -> RewardConfig:
        if (self.name is None) == (self.path is None):
            refuse([Problem(("name", "path"), "give exactly one of name, path")])
        if self.path is not None and not all(part.strip() for part in self.path.rpartition(":")):
            text = f"path: expected file.py:function or package.module:function, got {self.path!r}"
            refuse([Problem(("path",), text)])
        if self.name == ENVIRONMENT and self.args:
            text = "args: environment takes none; what its class takes is environment.args"
            refuse([Problem(("args", "name"), text)])
        if self.shaping and self.path is None:
            text = "shaping is for functions given by path: a built-in says itself what it judges"
            refuse([Problem(("shaping", "name"), text)])
        return self

    def where(self, index: int) -> str:
        """Its key in the recipe; ``index`` is its place among all of the recipe's functions."""
        return f"rewards[{index}]"

    def scores(self, source: str) -> bool:
        """Whether it scores the completions of this source of `data.mix`."""
        return True


class SourceReward(RewardConfig):
    """A reward of `data.mix`, as it stands among all functions of a recipe (``Recipe.functions``): with the sources
    that have it, and its key in the first of them."""

    sources: list[str]
    place: str

    def where(self, index: int) -> str:
        return self.place

    def scores(self, source: str) -> bool:
        return source in self.sources
