"""Calls as the model writes them: what is read, and what is said of those that cannot be made."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grpo.environments.calls import Call, Refused, find_calls, mismatch, parameters_of, shown_format
from grpo.environments.schema import schema_of


def search(query: str, most: int = 3) -> str:
    """Search.

    Args:
        query: What for.
        most: How many.
    """
    return query * most


def weigh(things: list[float], unit: str | None = None) -> float:
    """Weigh.

    Args:
        things: The weights.
        unit: The unit (choices: ["kg", "g"])
    """
    return sum(things)


def nothing() -> None:
    """Do nothing."""


def run(code: str) -> str:
    """Run code.

    Args:
        code: The code.
    """
    return code


TOOLS = parameters_of([schema_of(tool) for tool in (search, weigh, nothing)])
PYTHON = parameters_of([schema_of(run)])


def hermes(text: str) -> list[Call | Refused]:
    return find_calls("hermes", text, TOOLS)


def llama(text: str) -> list[Call | Refused]:
    return find_calls("llama", text, TOOLS)


def python(text: str) -> list[Call | Refused]:
    return find_calls("python", text, PYTHON)


def call_of(text: str, read: Any = hermes) -> tuple[str, dict[str, Any]]:
    (found,) = read(text)
    assert isinstance(found, Call), found
    return found.name, found.arguments


def refusal_of(text: str, read: Any = hermes) -> tuple[str, str, str]:
    (found,) = read(text)
    assert isinstance(found, Refused), found
    return found.kind, found.name, found.message


CAT = ("search", {"query": "cat"})
WELL_FORMED = [
    '<tool_call>\n{"name": "search", "arguments": {"query": "cat"}}\n</tool_call>',
    'I look.\n<tool_call>{"name":"search","arguments":{"query":"cat"}}</tool_call> Then I see.',
    '<tool_call>{"arguments": {"query": "cat"}, "name": "search"}</tool_call>',
    '<tool_call>{"name": "search", "parameters": {"query": "cat"}}</tool_call>',
    '<tool_call>{"name": "search", "arguments": "{\\"query\\": \\"cat\\"}"}</tool_call>',
    # as the tiny model's tokenizer decodes it, with a space between tokens
    '<tool_call> {"name": "search", "arguments": {"query": "cat" }} </tool_call>',
    '<think>maybe <tool_call>{"name": "nothing"}</tool_call></think>'
    '<tool_call>{"name": "search", "arguments": {"query": "cat"}}</tool_call>',
]


@pytest.mark.parametrize("text", WELL_FORMED)
def test_a_hermes_call(text: str) -> None:
    assert call_of(text) == CAT


def test_several_calls_in_one_turn_and_text_between() -> None:
    text = WELL_FORMED[0] + "and" + '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>'
    assert [(c.name, c.arguments) for c in hermes(text) if isinstance(c, Call)] == [CAT, ("nothing", {})]
    text = '<tool_call>{"name": "serch"}</tool_call>' + WELL_FORMED[0]
    first, second = hermes(text)
    assert isinstance(first, Refused)
    assert isinstance(second, Call)


def test_a_call_may_hold_the_closing_tag_in_a_string() -> None:
    assert call_of('<tool_call>{"name": "search", "arguments": {"query": "</tool_call>"}}</tool_call>') == (
        "search",
        {"query": "</tool_call>"},
    )


@pytest.mark.parametrize("text", ["", "The answer is 7.", "tool_call search", '{"name": "search"}', "</tool_call>"])
def test_a_turn_without_a_hermes_call(text: str) -> None:
    assert hermes(text) == []


def wrapped(arguments: str) -> str:
    return f'<tool_call>{{"name": "search", "arguments": {arguments}}}</tool_call>'


REFUSED = [
    ('<tool_call>{"name": "search", "arguments": {"query": "cat"}', "unclosed", "search", "no closing </tool_call>"),
    ('<tool_call>{"name": "search", "arguments": {"query": "cat"}}', "unclosed", "search", "no closing </tool_call>"),
    (
        '<tool_call>{"name": "search", "arguments": {"query": cat}}</tool_call>',
        "broken_json",
        "search",
        "not valid JSON",
    ),
    ("<tool_call>{'name': 'search'}</tool_call>", "broken_json", "", "Expecting property name"),
    ('<tool_call>{"name": "search", "arguments": {}} oh</tool_call>', "broken_json", "search", "behind the JSON: 'oh"),
    ('<tool_call>search(query="cat")</tool_call>', "broken_json", "", "not valid JSON"),
    ('<tool_call>["search"]</tool_call>', "broken_json", "", '{"name": ..., "arguments": {...}}'),
    ('<tool_call>{"tool": "search"}</tool_call>', "broken_json", "", '{"name": ..., "arguments": {...}}'),
    (wrapped('["cat"]'), "broken_json", "search", "arguments must be an object"),
    (wrapped('"cat"'), "broken_json", "search", "arguments must be an object"),
    (wrapped('{"query": "cat", "most": NaN}'), "broken_json", "search", "NaN"),
    (wrapped("{" * 5000), "broken_json", "search", "not valid JSON"),
    ('<tool_call>{"name": "serch", "arguments": {}}</tool_call>', "unknown_tool", "serch", "did you mean search?"),
    ('<tool_call>{"name": "zzz", "arguments": {}}</tool_call>', "unknown_tool", "zzz", "search, weigh, nothing"),
    (wrapped("{}"), "missing_argument", "search", "needs the argument 'query' (it takes query, most)"),
    (wrapped('{"query": "a", "mots": 2}'), "unknown_argument", "search", "did you mean most?"),
    (wrapped('{"query": "a", "x": 2}'), "unknown_argument", "search", "it takes query, most"),
    (wrapped('{"query": 7}'), "wrong_type", "search", "'query' must be a string, it is '7'"),
    (wrapped('{"query": "a", "most": "3"}'), "wrong_type", "search", "'most' must be an integer"),
    (wrapped('{"query": "a", "most": true}'), "wrong_type", "search", "'most' must be an integer"),
    (wrapped('{"query": "a", "most": 2.5}'), "wrong_type", "search", "'most' must be an integer"),
    (wrapped('{"query": null}'), "wrong_type", "search", "must be a string, it is 'null'"),
]


@pytest.mark.parametrize(("text", "kind", "name", "message"), REFUSED)
def test_a_call_that_cannot_be_made(text: str, kind: str, name: str, message: str) -> None:
    found = refusal_of(text)
    assert found[:2] == (kind, name)
    assert message in found[2]


def test_a_whole_number_is_an_integer() -> None:
    name, arguments = call_of(wrapped('{"query": "a", "most": 2.0}'))
    assert (name, arguments["most"], type(arguments["most"])) == ("search", 2, int)


LLAMA = [
    '{"name": "search", "parameters": {"query": "cat"}}',
    '  {"name": "search", "parameters": {"query": "cat"}}\n',
    '<|python_tag|>{"name": "search", "parameters": {"query": "cat"}}',
    'I look. <|python_tag|>{"type": "function", "name": "search", "parameters": {"query": "cat"}}',
    '{"name": "search", "arguments": {"query": "cat"}}',
]


@pytest.mark.parametrize("text", LLAMA)
def test_a_llama_call(text: str) -> None:
    assert call_of(text, llama) == CAT


def test_several_llama_calls_are_parted_by_semicolons() -> None:
    found = llama('{"name": "search", "parameters": {"query": "cat"}}; {"name": "nothing", "parameters": {}}')
    assert [c.name for c in found if isinstance(c, Call)] == ["search", "nothing"]


@pytest.mark.parametrize(
    "text", ["7", 'It is {"name": "search"}', '{"answer": 7}', '{"name": "Ann"}', "{x}", "{", '["search"]', ""]
)
def test_a_turn_without_a_llama_call(text: str) -> None:
    assert llama(text) == []


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ('{"name": "search", "parameters": {"query": cat}}', "broken_json", "not valid JSON"),
        ('{"name": "search", "parameters": {"query": "cat"}} so', "broken_json", "behind the call: 'so'"),
        ("<|python_tag|>search.call(cat)", "broken_json", "comes a call as JSON"),
        ('<|python_tag|>{"query": "cat"}', "broken_json", "a call is"),
        ('{"name": "serch", "parameters": {}}', "unknown_tool", "did you mean search?"),
    ],
)
def test_a_llama_call_that_cannot_be_made(text: str, kind: str, message: str) -> None:
    found = refusal_of(text, llama)
    assert found[0] == kind
    assert message in found[2]


def test_blocks_of_python() -> None:
    assert call_of("So:\n```python\nprint(1)\nx = 2\n```\n", python) == ("run", {"code": "print(1)\nx = 2\n"})
    assert call_of("```py\nx\n```", python) == ("run", {"code": "x\n"})
    found = python("```python\na\n```\nand\n```python\nb\n```")
    assert [c.arguments["code"] for c in found if isinstance(c, Call)] == ["a\n", "b\n"]
    assert python("```\nplain\n```") == python("`print(1)`") == python("```json\n{}\n```") == []
    assert refusal_of("```python\nprint(1)\n", python) == ("unclosed", "run", "the code block has no closing ```")
    assert refusal_of("```python\nprint('```')", python)[0] == "unclosed"


@pytest.mark.parametrize(
    ("value", "schema", "says"),
    [
        ([1, 2.5], {"type": "array", "items": {"type": "number"}}, ""),
        ([1, "a"], {"type": "array", "items": {"type": "number"}}, "[1] must be a number"),
        ({"a": 1}, {"type": "object", "additionalProperties": {"type": "string"}}, "['a'] must be a string"),
        ([1, "a"], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}, ""),
        ([1], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}, "must have 2 entries"),
        (None, {"type": "string", "nullable": True}, ""),
        ("kg", {"type": "string", "enum": ["kg", "g"]}, ""),
        ("t", {"type": "string", "enum": ["kg", "g"]}, 'must be one of ["kg", "g"]'),
        (1, {"type": ["integer", "string"]}, ""),
        ([], {"type": ["integer", "string"]}, "must be an integer or a string"),
        ([1], {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]}, ""),
        (1, {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]}, "none of its types"),
        (object, {}, ""),
    ],
)
def test_arguments_against_their_hints(value: Any, schema: dict[str, Any], says: str) -> None:
    found = mismatch(value, schema)
    assert (says in found) if says else found == ""


def test_choices_and_none_of_a_real_tool() -> None:
    assert call_of('<tool_call>{"name": "weigh", "arguments": {"things": [1], "unit": null}}</tool_call>')[0] == "weigh"
    kind, _, message = refusal_of('<tool_call>{"name": "weigh", "arguments": {"things": [1], "unit": "t"}}</tool_call>')
    assert (kind, "one of" in message) == ("wrong_type", True)


def test_the_format_that_a_template_shows() -> None:
    assert shown_format("… <tool_call>\n{} …") == "hermes"
    assert shown_format("{% if message.role == 'ipython' %}") == "llama"
    assert shown_format("{{ messages }}") == "hermes"


def test_messages_are_json_with_any_text() -> None:
    """What the model wrote may hold quotes and control characters; the answer quotes it."""
    for text in ['<tool_call>"\x00\ud800</tool_call>', "<tool_call>\u202e{</tool_call>"]:
        (found,) = hermes(text)
        assert isinstance(found, Refused)
        assert json.loads(json.dumps({"error": found.message}))["error"] == found.message
