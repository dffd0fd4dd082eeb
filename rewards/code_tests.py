"""The ``tests`` of a code task, read strictly, since a broken test must not teach anything.

Forms, as a dictionary or as its JSON text:

    {"fn_name": "f", "inputs": [[1, 2], …], "outputs": [3, …]}     calls: a list of arguments, and the value expected
    {"fn_name": null, "inputs": ["1 2\\n", …], "outputs": ["3\\n", …]}     standard input and output
    {"fn_name": "f", "test": "def check(candidate): …", "setup": "…"}     HumanEval's: Python that asserts

The first two are APPS', TACO's and LiveCodeBench's. They may also say how outputs are compared, by ``comparison``,
``tolerance`` and ``checker`` (``code_compare.py``); then the recipe's own way does not count for the row.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rewards.code_compare import Comparison, UnknownComparison
from rewards.sandbox import values

CATCHING = frozenset({"raises", "assertRaises", "assertRaisesRegex", "suppress"})


class BrokenTests(ValueError):
    """The row's tests cannot be used; the message says why."""


@dataclass(frozen=True)
class Calls:
    fn_name: str
    inputs: list[list[Any]]
    outputs: list[Any]
    comparison: Comparison | None = None  # the row's own


@dataclass(frozen=True)
class Script:
    inputs: list[str]
    outputs: list[str]
    fn_name: None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Check:
    """``source`` defines ``check(candidate)``, after the task's own helper functions. ``catches``: it has a handler of
    exceptions, so a call that fails may be what it expects."""

    fn_name: str
    source: str
    catches: bool


Tests = Calls | Script | Check


def parse_tests(tests: Any) -> Tests:
    """The tests of a row.

    Raises:
        BrokenTests: they have none of these forms, or are empty.
    """
    if isinstance(tests, str):
        return _parse_text(tests)
    return _parse(tests)


@lru_cache(maxsize=1024)
def _parse_text(text: str) -> Tests:
    try:
        return _parse(json.loads(text))
    except (json.JSONDecodeError, RecursionError) as why:
        raise BrokenTests(f"tests is not JSON: {why}") from None


def _parse(tests: Any) -> Tests:
    if not isinstance(tests, dict):
        raise BrokenTests(f"tests must be an object, got {type(tests).__name__}")
    fn_name = tests.get("fn_name") or None
    if fn_name is not None and not (isinstance(fn_name, str) and fn_name.isidentifier()):
        raise BrokenTests(f"fn_name must be a function's name or null, got {fn_name!r}")
    if tests.get("test"):
        return _parse_check(fn_name, tests["test"], tests.get("setup") or "")
    comparison = _comparison_of(tests)
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise BrokenTests("tests needs the lists inputs and outputs, or a test")
    if len(inputs) != len(outputs) or not inputs:
        raise BrokenTests(f"{len(inputs)} inputs and {len(outputs)} outputs: need as many, and at least one")
    if fn_name is None:
        for name, entries in (("inputs", inputs), ("outputs", outputs)):
            if not all(isinstance(entry, str) for entry in entries):
                raise BrokenTests(f"{name} must be strings where fn_name is null: standard input and output")
        return Script(inputs, outputs, comparison=comparison)
    if not all(isinstance(entry, list) for entry in inputs):
        raise BrokenTests("each of inputs must be the list of the function's arguments")
    for output in outputs:  # answers are encoded like this: a value that cannot be could never be matched
        if values.decode(values.encode(output)) != output:
            raise BrokenTests(f"this output equals nothing, itself included: {output!r}"[:200])
    return Calls(fn_name, inputs, outputs, comparison)


def _comparison_of(tests: dict[str, Any]) -> Comparison | None:
    said = {key: tests[key] for key in ("comparison", "tolerance", "checker") if tests.get(key)}
    if "comparison" in said:
        said["name"] = said.pop("comparison")
    try:
        return Comparison(**said) if said else None
    except UnknownComparison as why:
        raise BrokenTests(str(why)) from None


def _parse_check(fn_name: str | None, test: Any, setup: Any) -> Check:
    if fn_name is None or not isinstance(test, str) or not isinstance(setup, str):
        raise BrokenTests("a test needs fn_name, and test and setup must be Python text")
    source = f"{setup}\n\n{test}"
    if "def check(" not in test:
        raise BrokenTests("test defines no check(candidate)")
    try:
        tree = ast.parse(source, "<test>")  # the data set's text, not the model's; not run here
        compile(tree, "<test>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as why:
        raise BrokenTests(f"test is no Python: {why}") from None
    return Check(fn_name, source, any(map(_catches, ast.walk(tree))))


def _catches(node: ast.AST) -> bool:
    if isinstance(node, ast.ExceptHandler):
        return True
    return getattr(node, "attr", getattr(node, "id", None)) in CATCHING
