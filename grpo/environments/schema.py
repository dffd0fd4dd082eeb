"""A tool's JSON schema, from its type hints and docstring. Standard library only.

It is what ``transformers.utils.get_json_schema`` makes (tests compare the two), and what chat templates show the model.
That function imports torch, which the processes of environments do without.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any

TYPES: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
SECTIONS = re.compile(
    r"^[ \t]*(Args|Arguments|Parameters|Returns|Raises|Yields|Example|Examples|Note|Notes):[ \t]*$", re.M
)
ARGUMENT = re.compile(r"^(\s*)(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


class NoSchema(Exception):
    """A function's hints or docstring do not say what the model must know; the message says what is missing."""


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """``{"type": "function", "function": {"name", "description", "parameters"}}``. Raises NoSchema."""
    doc = inspect.getdoc(function)
    if not doc or not doc.strip():
        raise NoSchema("it has no docstring; the model is told what a tool does by its docstring")
    description, arguments, returns = parts_of(doc)
    hints = _hints(function)
    properties: dict[str, Any] = {}
    required = []
    for parameter in _parameters(function):
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise NoSchema(f"argument {parameter} cannot be given by name; a tool's arguments are named one by one")
        if parameter.annotation is parameter.empty:
            raise NoSchema(f"argument {name!r} has no type hint")
        if name not in arguments:
            raise NoSchema(f"the docstring does not describe argument {name!r} (under a line `Args:`, as `{name}: …`)")
        properties[name] = _with_description(of_hint(hints[name]), arguments[name])
        if parameter.default is parameter.empty:
            required.append(name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    found = {"name": function.__name__, "description": description, "parameters": parameters}
    if "return" in hints:
        found["return"] = of_hint(hints["return"]) | ({"description": returns} if returns else {})
    return {"type": "function", "function": found}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception as why:  # a hint may be any expression
        raise NoSchema(f"its type hints cannot be read: {type(why).__name__}: {why}") from None


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Its parameters, without a method's own first one."""
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name in ("self", "cls") and parameters[0].annotation is inspect.Parameter.empty:
        del parameters[0]
    return parameters


def of_hint(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint. A class that JSON has no type for is an object. Raises NoSchema."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is None:
        return dict(TYPES.get(hint, {"type": "object"}))
    if origin is typing.Union or origin is types.UnionType:
        return _of_union(inner)
    if origin is typing.Literal:
        names = list(dict.fromkeys(TYPES.get(type(value), {}).get("type") for value in inner))
        if None in names or "array" in names or "object" in names:
            raise NoSchema(f"{_shown(hint)} holds what JSON has no constant for")
        return {"type": names[0] if len(names) == 1 else names, "enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": of_hint(inner[0])}
    if origin is tuple:
        if len(inner) == 1 or ... in inner:
            raise NoSchema(f"{_shown(hint)}: write list[…] for a list of any length")
        return {"type": "array", "prefixItems": [of_hint(each) for each in inner]}
    if origin is dict:
        return {"type": "object", "additionalProperties": of_hint(inner[1])}
    raise NoSchema(f"JSON has no type for {_shown(hint)}")


def _of_union(inner: tuple[Any, ...]) -> dict[str, Any]:
    kinds = [of_hint(each) for each in inner if each is not type(None)]
    if len(kinds) == 1:
        found = kinds[0]
    elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        found = {"type": names[0] if len(names) == 1 else names}
    else:
        found = {"anyOf": kinds}
    return found | ({"nullable": True} if type(None) in inner else {})


def _shown(hint: Any) -> str:
    return str(hint).replace("typing.", "")


def _with_description(schema: dict[str, Any], description: str) -> dict[str, Any]:
    """With what the docstring says of the argument; ``(choices: ["tea", "coffee"])`` at its end lists its values."""
    if choices := CHOICES.search(description):
        try:
            schema["enum"] = [c.strip() if isinstance(c, str) else c for c in json.loads(choices.group(1))]
        except (ValueError, TypeError):
            raise NoSchema(f"{choices.group().strip()} holds no JSON list") from None
        description = description[: choices.start()].strip()
    return {**schema, "description": description}


def parts_of(doc: str) -> tuple[str, dict[str, str], str]:
    """A docstring in Google's style: what stands before its sections, what it says of each argument, and of the
    result."""
    heads = [*SECTIONS.finditer(doc)]
    bounds = [*(head.start() for head in heads), len(doc)]
    bodies = {head.group(1): doc[head.end() : end] for head, end in zip(heads, bounds[1:], strict=True)}
    arguments: dict[str, str] = {}
    depth: int | None = None
    latest = ""
    for line in (bodies.get("Args") or bodies.get("Arguments") or bodies.get("Parameters") or "").splitlines():
        found = ARGUMENT.match(line)
        if found and (depth is None or len(found.group(1)) <= depth):
            depth = len(found.group(1))
            latest = found.group(2)
            arguments[latest] = found.group(3).strip()
        elif latest and line.strip():
            arguments[latest] = f"{arguments[latest]} {line.strip()}".strip()
    return doc[: bounds[0]].strip(), arguments, bodies.get("Returns", "").strip()
