"""Calls of tools as the model writes them, in the formats of chat templates, and what is wrong with them.

Pure functions of text. A call that cannot be made is answered with words that the model can learn from, and counted by
its kind (``ToolCall.error``). The grammar is as strict as that of servers: what is trained here must work there.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = ("hermes", "llama", "python")
OPENS, CLOSES = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python|py|python3)[ \t]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.M | re.S)
CLOSED = re.compile(r"^[ \t]*```[ \t]*\Z", re.M)
THINKS, THOUGHT = "<think>", "</think>"

NAMES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}


@dataclass(frozen=True)
class Call:
    """A call that can be made. ``text`` is what the model wrote for the arguments."""

    name: str
    arguments: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Refused:
    """A call that cannot be made: its ``kind`` of error, and the ``message`` for the model. ``name`` and ``text`` are
    what can be read of it."""

    kind: str
    message: str
    name: str = ""
    text: str = ""


Schemas = Mapping[str, dict[str, Any]]
"""The parameters of each tool as a JSON schema, by its name."""


def parameters_of(tools: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The parameters of tools, by name, from the schemas that chat templates take."""
    return {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}


def shown_format(template: str) -> str:
    """The format that a chat template shows the model; hermes where it shows none that is known."""
    if OPENS in template:
        return "hermes"
    return "llama" if "ipython" in template or PYTHON_TAG in template else "hermes"


EXAMPLES = {
    "hermes": f'{OPENS}\n{{"name": "x", "arguments": {{}}}}\n{CLOSES}',
    "llama": '{"name": "x", "parameters": {}}',
    "python": "```python\n1\n```\n",
}
"""A call in each format."""


def is_lost(form: str, text: str, tools: Schemas) -> bool:
    """Whether ``EXAMPLES[form]``, which is now ``text``, is no call any more."""
    found = find_calls(form, text, tools)
    return not found or any(isinstance(call, Refused) and call.kind in ("unclosed", "broken_json") for call in found)


def behind_thinking(text: str) -> str:
    """What the model has said, not thought: all behind the last ``</think>``, and nothing of thinking that has not
    ended."""
    return text.rpartition(THOUGHT)[2].partition(THINKS)[0]


def find_calls(form: str, text: str, tools: Schemas) -> list[Call | Refused]:
    """The calls in a turn's text, in their order. What the model has only thought of (before ``</think>``) is none."""
    text = text.rpartition(THOUGHT)[2]
    if form == "python":
        return _of_python(text, tools)
    written = _of_hermes(text) if form == "hermes" else _of_llama(text)
    return [found if isinstance(found, Refused) else _checked(found, tools) for found in written]


# --- hermes: <tool_call>{"name": …, "arguments": {…}}</tool_call>


def _of_hermes(text: str) -> list[dict[str, Any] | Refused]:
    found: list[dict[str, Any] | Refused] = []
    at = text.find(OPENS)
    while at >= 0:
        start = _skip_space(text, at + len(OPENS))
        value, end, why = _json_at(text, start)
        after = _skip_space(text, end)
        close = text.find(CLOSES, start)
        if not why and text.startswith(CLOSES, after):
            found.append(_as_object(value, text[start:end]))
            at = text.find(OPENS, after)
            continue
        if close < 0 and (why or after == len(text)):
            written = text[start:]
            found.append(Refused("unclosed", f"the call has no closing {CLOSES}", _name_in(written), written))
            break
        written = text[start : close if close >= 0 else len(text)].rstrip()
        why = why or f"there is text behind the JSON: {_brief(text[after:])}"
        found.append(Refused("broken_json", f"the call is not valid JSON: {why}", _name_in(written), written))
        at = text.find(OPENS, close if close >= 0 else len(text))
    return found


def _as_object(value: Any, written: str) -> dict[str, Any] | Refused:
    """The name and arguments of a call's JSON."""
    form = '{"name": ..., "arguments": {...}}'
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Refused("broken_json", f"a call is {form}; this one is {_brief(written)}", "", written)
    given = value.get("arguments", value.get("parameters", {}))
    if isinstance(given, str):  # JSON within JSON, as OpenAI's clients write it
        given, _, why = _json_at(given, 0)
        given = None if why else given
    if not isinstance(given, dict):
        return Refused(
            "broken_json",
            f"arguments must be an object with the arguments by name, as in {form}",
            value["name"],
            written,
        )
    return {"name": value["name"], "arguments": given}


def _json_at(text: str, start: int) -> tuple[Any, int, str]:
    """The JSON value at a place, where it ends, and what is wrong with it."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        return value, end, ""
    except json.JSONDecodeError as why:
        return None, start, f"{why.msg} at character {why.pos - start} of {_brief(text[start:])}"
    except (ValueError, RecursionError) as why:
        return None, start, str(why) or "it is nested too deeply"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _name_in(written: str) -> str:
    """The tool that broken JSON seems to call."""
    found = re.search(r'"name"\s*:\s*"(\w+)"', written)
    return found.group(1) if found else ""


def _brief(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:57] + "...")


# --- llama: {"name": …, "parameters": {…}}, all that a turn says, or all behind <|python_tag|>


def _of_llama(text: str) -> list[dict[str, Any] | Refused]:
    _, tag, tail = text.rpartition(PYTHON_TAG)
    text = tail.strip()
    if not text.startswith("{"):
        if tag:
            return [Refused("broken_json", f"behind {PYTHON_TAG} comes a call as JSON, not {_brief(text)}", "", text)]
        return []
    found: list[dict[str, Any] | Refused] = []
    at = 0
    while at < len(text):
        value, end, why = _json_at(text, at)
        if not tag and not found and not _looks_like_call(value, text):
            return []  # an answer that happens to be JSON
        if why:
            return [
                *found,
                Refused("broken_json", f"the call is not valid JSON: {why}", _name_in(text[at:]), text[at:]),
            ]
        found.append(_as_object(value, text[at:end]))
        at = _skip_space(text, end)
        if at < len(text) and text[at] != ";":  # several calls are parted by semicolons
            why = f"there is text behind the call: {_brief(text[at:])}"
            return [*found[:-1], Refused("broken_json", why, _name_in(text[:end]), text)]
        at = _skip_space(text, at + 1)
    return found


def _looks_like_call(value: Any, text: str) -> bool:
    if isinstance(value, dict):
        return "name" in value and ("parameters" in value or "arguments" in value)
    return bool(re.match(r'\{\s*"name"\s*:', text))


# --- python: a fenced block for the one tool that takes code


def _of_python(text: str, tools: Schemas) -> list[Call | Refused]:
    ((name, parameters),) = tools.items()
    (argument,) = parameters["properties"]
    found: list[Call | Refused] = []
    for block in FENCE.finditer(text):
        code = block.group(1)
        if not CLOSED.search(block.group()):
            found.append(Refused("unclosed", "the code block has no closing ```", name, code))
        else:
            found.append(Call(name, {argument: code}, code))
    return found


# --- arguments against the schema


def _checked(call: dict[str, Any], tools: Schemas) -> Call | Refused:
    """The call, where its tool is there and takes its arguments."""
    name, given = call["name"], call["arguments"]
    written = json.dumps(given, ensure_ascii=False)
    if name not in tools:
        near = difflib.get_close_matches(name, tools, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(tools)}"
        return Refused("unknown_tool", f"there is no tool {name!r}{hint}", name, written)
    properties, needed = tools[name]["properties"], tools[name].get("required", [])
    takes = ", ".join(properties) or "no arguments"
    if unknown := [argument for argument in given if argument not in properties]:
        near = difflib.get_close_matches(unknown[0], properties, n=1)
        hint = f"; did you mean {near[0]}?" if near else f" (it takes {takes})"
        return Refused("unknown_argument", f"{name} has no argument {unknown[0]!r}{hint}", name, written)
    if missing := [argument for argument in needed if argument not in given]:
        return Refused(
            "missing_argument", f"{name} needs the argument {missing[0]!r} (it takes {takes})", name, written
        )
    arguments: dict[str, Any] = {}
    for argument, value in given.items():
        if why := mismatch(value, properties[argument]):
            return Refused("wrong_type", f"{name}: the argument {argument!r}{why}", name, written)
        arguments[argument] = int(value) if _is_whole(value, properties[argument]) else value
    return Call(name, arguments, written)


def _is_whole(value: Any, schema: dict[str, Any]) -> bool:
    """Is it a number like 3.0 where an integer is meant?"""
    return isinstance(value, float) and schema.get("type") == "integer"


def mismatch(value: Any, schema: dict[str, Any]) -> str:
    """Why a JSON value is not what a schema asks for, as the end of a sentence; empty where it is."""
    if value is None and schema.get("nullable"):
        return ""
    if "anyOf" in schema:
        return "" if any(not mismatch(value, kind) for kind in schema["anyOf"]) else " has none of its types"
    kinds = schema.get("type")
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not any(_is_a(value, kind) for kind in kinds):
            wanted = " or ".join(NAMES.get(kind, kind) for kind in kinds)
            return f" must be {wanted}, it is {_brief(json.dumps(value, ensure_ascii=False))}"
    if "enum" in schema and value not in schema["enum"]:
        return f" must be one of {json.dumps(schema['enum'], ensure_ascii=False)}, it is {json.dumps(value)}"
    if isinstance(value, list):
        return _mismatch_in_list(value, schema)
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        for key, item in value.items():
            if why := mismatch(item, schema["additionalProperties"]):
                return f"[{key!r}]{why}"
    return ""


def _mismatch_in_list(value: list[Any], schema: dict[str, Any]) -> str:
    each = schema.get("prefixItems")
    if each is not None and len(each) != len(value):
        return f" must have {len(each)} entries, it has {len(value)}"
    for place, item in enumerate(value):
        if why := mismatch(item, each[place] if each is not None else schema.get("items", {})):
            return f"[{place}]{why}"
    return ""


def _is_a(value: Any, kind: str) -> bool:
    if kind == "integer":
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    if kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    types = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict}
    return isinstance(value, types.get(kind, object))
