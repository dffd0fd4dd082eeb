"""The recipe's `environment` section: what answers the model between its turns (docs/environments.md)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from grpo.config.base import LocalPath, NonNegativeInt, Positive, PositiveInt, Problem, Section, refuse

ENVIRONMENTS = ("calculator", "number_guess", "python", "tests", "wordle")
"""The built-in environments; ``grpo.environments`` has a module for each, which a test holds."""
SECONDS_OF_A_CALL = {"python": (1, 5.0), "tests": (6, 4.0)}
"""Of built-in environments with a time limit of their own (`args.timeout`): how many times that a call may take, and
what it is by default. `tests` judges standard inputs in four times one's seconds, ends the last one and its checker."""
MARGIN = 2.0  # seconds for all else in such a call
TOOL_FORMATS = ("auto", "hermes", "llama", "python")


class EnvironmentConfig(Section):
    name: Literal["calculator", "number_guess", "python", "tests", "wordle"] | None = None
    """A built-in environment; docs/environments.md describes them."""
    path: LocalPath | None = None
    """A class of yours: `my_env.py:Env` or `package.module:Env`. Either TRL's protocol (`reset`, public methods as
    tools, `get_reward`) or `reset` and `step(text)`."""
    tools: list[LocalPath] = Field(default_factory=list)
    """Functions of yours that the model may call, beside the environment's or alone: `my_tools.py:search`. They need
    type hints and a docstring."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the environment's constructor."""
    max_turns: PositiveInt = 8
    """Most turns of the model in an episode. What its last turn asks for is not answered."""
    max_turn_length: PositiveInt | None = None
    """Most tokens of one turn; null leaves a turn all that is left of `rollout.max_completion_length`, which counts the
    model's tokens of all turns together."""
    max_observation_length: PositiveInt = 256
    """Most tokens of one answer of the environment, the chat template's around it included. A longer one is cut in the
    middle, and says so."""
    tool_format: Literal["auto", "hermes", "llama", "python"] = "auto"
    """How the model writes a call: `hermes` (`<tool_call>` with JSON; Qwen too), `llama` (bare JSON with `name` and
    `parameters`), `python` (a fenced code block, for an environment with one tool that takes code). `auto` takes what
    the tokenizer's chat template shows, or `hermes`."""
    timeout: Positive = 10.0
    """Seconds that one call of the environment may take. A later one costs its episode, which has no reward then. Where
    a built-in's own `args.timeout` asks for more, that is the default."""
    memory_limit_gb: Positive | None = 1.0
    """Memory (address space) that one episode's process may take beside what the imports of its code took; null sets no
    limit."""
    overlap_steps: NonNegativeInt = 16
    """With `rollout.backend: hf`: tokens that each other episode draws while a tool runs, before all wait for it; up to
    twice as many, so that several come back together. Higher suits slow tools, lower few episodes; answers are never
    waited for by the clock, so that a resumed run repeats ([backends.md](backends.md))."""

    @model_validator(mode="after")
    def _one_environment(self) -> EnvironmentConfig:
        given = [key for key in ("name", "path") if getattr(self, key)]
        if len(given) > 1 or not (given or self.tools):
            text = "give one of name, path, or tools alone" if not given else "give one of name, path, not both"
            refuse([Problem(("name", "path", "tools"), text)])
        return self

    @model_validator(mode="after")
    def _room_for_a_call(self) -> EnvironmentConfig:
        times, default = SECONDS_OF_A_CALL.get(self.name or "", (0, 0.0))
        own = self.args.get("timeout", default)
        if not times or not isinstance(own, (int, float)):
            return self
        least = times * own + MARGIN
        if "timeout" not in self.model_fields_set:
            vars(self)["timeout"] = max(self.timeout, least)
        elif self.timeout < least:
            text = (
                f"a call of {self.name} may take {least:g} s, by its args.timeout of {own:g}; raise it, or lower that"
            )
            refuse([Problem(("timeout",), text)])
        return self

    @property
    def max_environment_tokens(self) -> int:
        """Most tokens that the environment adds to an episode: one answer before each turn."""
        return self.max_turns * self.max_observation_length
