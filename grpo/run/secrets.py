"""Secrets in a recipe or a command line are not written into the run folder.

``rewards.args.api_key=…`` is needed to run, and not to know later what was run. What a run writes has ``LEFT_OUT`` in
its place, and a recipe that still holds that is refused by the key (``config/load.py``), so that it is given again.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from typing import Any

import yaml

from grpo.config import Recipe
from grpo.config.load import LEFT_OUT
from rewards.secrets import IN_URL, LOOKS, long_enough, secrets_of

# Names of arguments. Fewer than of variables: `eos_token` and `answer_key` are none.
NAME = re.compile(
    r"secret|passw|passphrase|credential|bearer|authorization|(api|access|private|auth|secret|openai|judge)[_-]?key"
    r"|(api|access|auth|hf|hub|bearer|session|refresh|secret|use_auth|github|wandb)[_-]?token",
    re.IGNORECASE,
)
WEAK = re.compile(r"(^|[_-])(token|key|auth|pat)$", re.IGNORECASE)  # a secret only where the value may be one
MAY_BE = re.compile(r"(?![<\[])(?=\S*\d)(?=\S*[A-Za-z])\S{12,}")  # no `<|reserved_token_0|>`
OPTION = re.compile(r"(--?[\w-]+)=(.+)", re.DOTALL)
SHORTEST_KNOWN = 6  # characters

_known: set[str] = set()  # what this process has left out, but for what is so short that it may stand anywhere


def recipe_without_secrets(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON values, for files."""
    return without_secrets(recipe.model_dump(mode="json"))


def given_without_secrets(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe is no default, as JSON values: a version with further keys says the same of it."""
    return without_secrets(recipe.model_dump(mode="json", exclude_defaults=True))


def command_without_secrets(arguments: list[str]) -> list[str]:
    """A command line with overrides (``a.b=c``) and options, for files."""
    return [scrubbed(_argument(argument)) for argument in _items(arguments)]


def scrubbed(text: str) -> str:
    """A text without the secrets that this process knows of, and without what looks like one: for tracebacks."""
    known = _known.union(long_enough(secrets_of(os.environ).values()))
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, LEFT_OUT)
    return IN_URL.sub(LEFT_OUT, LOOKS.sub(LEFT_OUT, text))


def without_secrets(value: Any, name: str = "") -> Any:
    """A JSON value with ``LEFT_OUT`` for each secret in it: what is called like one, looks like one, or is the value of
    such a variable of the environment."""
    if isinstance(value, dict):
        inner = name if _is_secret(name, "") else ""
        return {key: without_secrets(item, inner or str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, name) for item in _items(value)]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if _is_secret(name, str(value)):
        _remember(str(value))
        return LEFT_OUT
    return scrubbed(value) if isinstance(value, str) else value


def _remember(secret: str) -> None:
    if len(secret) >= SHORTEST_KNOWN:
        _known.add(secret)


def _is_secret(name: str, value: str) -> bool:
    if NAME.search(name):
        return True
    return WEAK.search(name) is not None and MAY_BE.fullmatch(value) is not None


def _items(items: Iterable[Any]) -> Iterable[Any]:
    """The items of a list, in which ``--api-key=X`` and ``--api-key X`` may be."""
    before = ""
    for item in items:
        option = OPTION.fullmatch(item) if isinstance(item, str) else None
        if option and _is_secret(option[1].lstrip("-"), option[2]):
            _remember(option[2])
            yield f"{option[1]}={LEFT_OUT}"
        elif before.startswith("--") and isinstance(item, str) and _is_secret(before.lstrip("-"), item):
            _remember(item)
            yield LEFT_OUT
        else:
            yield item
        before = item if isinstance(item, str) and "=" not in item else ""


def _argument(argument: str) -> str:
    """An argument of a command line; of an override the value is looked at, which may be YAML."""
    key, equals, text = argument.partition("=")
    if not equals:
        return argument
    names = [name for name in key.lstrip("-").split(".") if not name.isdigit()] or [key]
    name = next((n for n in names if _is_secret(n, text)), names[-1])
    if without_secrets(text, name) != text:
        return f"{key}={LEFT_OUT}" if _is_secret(name, text) else f"{key}={without_secrets(text, name)}"
    with contextlib.suppress(yaml.YAMLError):
        without_secrets(yaml.safe_load(text), name)  # what it finds is known from then on
    return argument
