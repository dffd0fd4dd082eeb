"""Where a recipe's environment is, and in which format its tools are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo import user_code
from grpo.config import EnvironmentConfig, Source
from grpo.environments.calls import shown_format
from grpo.environments.loading import About, Spec
from grpo.errors import UserError

BUILT_IN = {
    "calculator": "grpo.environments.calculator:Calculator",
    "number_guess": "grpo.environments.number_guess:NumberGuess",
    "python": "grpo.environments.python:Python",
    "tests": "grpo.environments.tests:WithTests",
    "wordle": "grpo.environments.wordle:Wordle",
}


def spec_of(config: EnvironmentConfig) -> Spec:
    """What to load for a recipe. Raises UserError where a path names no file."""
    source, place = "", ""
    if config.name is not None:
        source = place = BUILT_IN[config.name]
    elif config.path is not None:
        source, place = config.path, _absolute(config.path, "environment.path")
    tools = [_absolute(tool, f"environment.tools[{number}]") for number, tool in enumerate(config.tools)]
    return Spec(source, place, tools, config.args, builtin=config.name is not None)


def _absolute(place: str, key: str) -> str:
    module, name = user_code.split_place(place, key)
    return f"{user_code.file_of(module, key) or module}:{name}"


def tool_format(config: EnvironmentConfig, sources: Sequence[Source], tokenizer: Any, about: About) -> str:
    """The format of calls. Raises UserError where ``python`` cannot name a tool and its argument."""
    form: str = config.tool_format
    if form == "auto":
        chat = any(source.rows.template == "chat" for source in sources)
        form = shown_format(str(tokenizer.chat_template)) if chat and tokenizer.chat_template else "hermes"
    if form == "python" and not about.game:
        parameters = [tool["function"]["parameters"] for tool in about.tools]
        texts = [
            [kind.get("type") for kind in of_tool["properties"].values()]
            for of_tool in parameters
            if len(of_tool.get("required", [])) <= 1
        ]
        if texts != [["string"]]:
            names = ", ".join(tool["function"]["name"] for tool in about.tools)
            raise UserError(
                "environment.tool_format: python runs every block of code with the one tool there is, which takes one "
                f"text; the tools here are {names}. Take tool_format: hermes"
            )
    return form
