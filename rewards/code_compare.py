"""Whether what a program returned or wrote is what a test expects: the comparisons of code tasks, by name.

    exact          equal values of equal types; equal lines, but for blanks at their ends and empty lines at the end
    livecodebench  as LiveCodeBench compares: tuples are lists, 1 is 1.0; lines that are equal numbers, as decimals
    tolerance      with either: decimals may differ by so much, absolutely or relative to the expected one (only
                   absolutely from an expected integer; an integer from another never)
    checker        a program of the data set's own decides (``code_runs.py`` has it run in the sandbox)

What comes from a program is hostile bytes. They are compared as bytes, or as plain JSON and as text, here; they never
become Python objects that could do something.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Context, Decimal
from math import isfinite
from typing import Any

EXACT, LIVECODEBENCH = "exact", "livecodebench"
NAMES = (EXACT, LIVECODEBENCH)
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6})?")
INTEGER = re.compile(r"[+-]?[0-9]+")
QUIET = Context(prec=40, traps=[])  # nothing raises, whatever the exponents


class UnknownComparison(RuntimeError):
    """No comparison of this name or with this tolerance; the message says which there are."""


@dataclass(frozen=True)
class Comparison:
    """``checker`` is the text of a program that defines ``check(input, output, expected)``; with one, it alone
    decides."""

    name: str = EXACT
    tolerance: float | None = None
    checker: str = ""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UnknownComparison(f"comparison is one of {', '.join(NAMES)}, got {self.name!r}")
        number = isinstance(self.tolerance, (int, float)) and not isinstance(self.tolerance, bool)
        if self.tolerance is not None and not (number and 0 < self.tolerance < 1):
            raise UnknownComparison(f"tolerance is a number between 0 and 1, such as 1e-6, got {self.tolerance!r}")
        if self.checker:
            _check_source(self.checker)

    def same_value(self, answer: bytes, expected: str) -> bool:
        """Whether a value that a program returned is the expected one, both as lines of ``sandbox/values.py``."""
        if answer == expected.encode():
            return True
        if self.name == EXACT and self.tolerance is None:
            return False
        try:
            given, wanted = json.loads(answer), json.loads(expected)
            if self.name == LIVECODEBENCH:
                given, wanted = _as_python_compares(given), _as_python_compares(wanted)
            return self._same(given, wanted)
        except (ValueError, TypeError, KeyError, RecursionError, MemoryError, OverflowError):
            return False  # it is not what `values` writes

    def same_text(self, output: str, expected: str) -> bool:
        """Whether what a program wrote is what it should have written."""
        if self.name == LIVECODEBENCH:
            given, wanted = _stripped(output), _stripped(expected)
        else:
            given, wanted = _lines(output), _lines(expected)
        return len(given) == len(wanted) and all(map(self._same_line, given, wanted))

    def _same_line(self, given: str, wanted: str) -> bool:
        if given == wanted:
            return True
        if self.name == EXACT and self.tolerance is None:
            return False
        ours, theirs = given.split(), wanted.split()
        if len(ours) != len(theirs):
            return False
        if self.name == LIVECODEBENCH and all(map(NUMBER.fullmatch, [*ours, *theirs])):
            return all(self._same_number(*pair) for pair in zip(ours, theirs, strict=True))
        if self.tolerance is None:
            return False
        return all(
            a == b or (NUMBER.fullmatch(a) and NUMBER.fullmatch(b) and self._same_number(a, b))
            for a, b in zip(ours, theirs, strict=True)
        )

    def _same_number(self, given: str, wanted: str) -> bool:
        """Two numbers as they are written. No integer is near another."""
        a, b = Decimal(given), Decimal(wanted)
        if a == b:
            return True
        if self.tolerance is None or (INTEGER.fullmatch(given) and INTEGER.fullmatch(wanted)):
            return False
        return self._near(a, b, INTEGER.fullmatch(wanted) is not None)

    def _near(self, a: Decimal, b: Decimal, absolutely: bool) -> bool:
        room = QUIET.create_decimal_from_float(float(self.tolerance or 0))
        size = Decimal(1) if absolutely else max(Decimal(1), QUIET.abs(b))
        apart = QUIET.abs(QUIET.subtract(a, b))
        return apart.is_finite() and apart <= QUIET.multiply(room, size)

    def _same(self, given: Any, wanted: Any) -> bool:
        """Two values as JSON of ``sandbox/values.py``; the expected one bounds how deep this goes."""
        if type(given) is type(wanted) and given == wanted:
            return True
        if isinstance(wanted, list):
            return isinstance(given, list) and len(given) == len(wanted) and all(map(self._same, given, wanted))
        if isinstance(wanted, dict):
            if not isinstance(given, dict) or given.keys() != wanted.keys():
                return False
            return all(self._same(given[tag], wanted[tag]) for tag in wanted)
        if _is_number(given) and _is_number(wanted):
            if given == wanted:
                return self.name == LIVECODEBENCH or float in (type(given), type(wanted))
            if self.tolerance is None or not (isfinite(given) and isfinite(wanted)):
                return False
            if type(given) is int and type(wanted) is int:
                return False
            return self._near(Decimal(given), Decimal(wanted), type(wanted) is int)
        return False


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _as_python_compares(tree: Any) -> Any:
    """A value in which what Python's ``==`` takes for equal is written alike, and tuples are lists."""
    if isinstance(tree, bool):
        return int(tree)
    if isinstance(tree, float) and tree.is_integer():
        return int(tree)
    if isinstance(tree, list):
        return [_as_python_compares(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((tag, content),) = tree.items()
    if tag == "int":
        return int(content, 16)
    if not isinstance(content, list):
        return tree
    content = _as_python_compares(content)
    if tag == "tuple":
        return content
    if tag in ("set", "frozenset", "dict"):
        return {"set" if tag == "frozenset" else tag: sorted(content, key=json.dumps)}
    return {tag: content}


def _lines(text: str) -> list[str]:
    """Output without blanks at the ends of lines and empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _stripped(text: str) -> list[str]:
    """Output without blanks around lines and empty lines around the whole."""
    return [line.strip() for line in text.strip().split("\n")]


def _check_source(source: Any) -> None:
    if not isinstance(source, str) or "def check(" not in source:
        raise UnknownComparison("a checker is Python text that defines check(input, output, expected)")
    try:
        compile(source, "<checker>", "exec", dont_inherit=True)  # the data set's text, not the model's; not run here
    except (SyntaxError, ValueError) as why:
        raise UnknownComparison(f"the checker is no Python: {why}") from None
