"""Plain Python values as one line of JSON that keeps their exact types, written in exactly one way.

None, bool, int, float, str, list, tuple, dict, set, frozenset, bytes and complex. The standard library's own kinds of
dictionary are written as dictionaries, named tuples as tuples, and numpy's numbers as numbers, which they all equal. An
instance of any other class, a subclass included, is written as foreign and equals nothing. Two values are the same, in
type and value all the way down, if and only if their lines are. So answers are compared as bytes, and whoever compares
them never makes objects of what a hostile process sends. (-0.0 is written as 0.0, which it equals. The order of a
dictionary does not count.)
"""

from __future__ import annotations

import json
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 100
DICTIONARIES = (dict, Counter, OrderedDict, defaultdict)
SMALL = 2**53  # larger integers travel in hexadecimal: Python refuses to read decimals of over 4300 digits


class Foreign:
    """A value that could not travel: only its type's name is known. Equals nothing, itself included."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{self.type_name}>"


class Malformed(ValueError):
    """Text that ``encode`` does not write."""


def encode(value: Any) -> str:
    """A value as one line, the same for equal values: dictionaries and sets are sorted."""
    return json.dumps(_tag(value, 0, sorted))


def encode_in_order(value: Any) -> str:
    """A value as one line, dictionaries in their own order: for arguments, whose order a function may see."""
    return json.dumps(_tag(value, 0, lambda items, key: list(items)))


def decode(line: str | bytes) -> Any:
    """The value of a line. For the processes of a sandbox: hostile text may take all the time and memory there is.

    Raises:
        Malformed: ``encode`` does not write that.
    """
    try:
        return _untag(json.loads(line), 0)
    except Exception as why:  # wrong types, huge numbers, no memory, endless nesting: bytes can cause any of these
        raise Malformed(f"{type(why).__name__}: {why}"[:200]) from None


def _tag(value: Any, depth: int, order: Callable[..., list[Any]]) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is float:
        return value or 0.0
    if kind is int:
        return value if -SMALL < value < SMALL else {"int": hex(value)}
    if depth >= MAX_DEPTH:
        return {"foreign": "nested too deeply"}
    if kind is list or kind is tuple:
        items = [_tag(item, depth + 1, order) for item in value]
        return items if kind is list else {"tuple": items}
    if kind is set or kind is frozenset:
        return {kind.__name__: order((_tag(item, depth + 1, order) for item in value), key=json.dumps)}
    if kind in DICTIONARIES:
        pairs = ([_tag(key, depth + 1, order), _tag(item, depth + 1, order)] for key, item in value.items())
        return {"dict": order(pairs, key=lambda pair: json.dumps(pair[0]))}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [value.real or 0.0, value.imag or 0.0]}
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return {"tuple": [_tag(item, depth + 1, order) for item in tuple.__iter__(value)]}
    if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].generic):
        number = value.item()
        return {"foreign": kind.__name__} if type(number) is kind else _tag(number, depth + 1, order)
    return {"foreign": kind.__name__}


def _untag(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH + 1:
        raise Malformed("nested too deeply")
    if isinstance(value, list):
        return [_untag(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "int":
        return int(content, 16)
    if tag in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](_untag(item, depth + 1) for item in content)
    if tag == "dict":
        return {_untag(key, depth + 1): _untag(item, depth + 1) for key, item in content}
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag == "complex":
        real, imaginary = content
        return complex(real, imaginary)
    if tag == "foreign":
        return Foreign(str(content)[:100])
    raise Malformed(f"unknown tag {tag!r}"[:100])
