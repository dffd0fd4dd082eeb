"""Plain Python values as JSON that keeps their exact types, and the comparison that respects them.

None, bool, int, float, str, list, tuple, dict, set, frozenset, bytes and complex, nothing else: an instance of a
subclass, or of any other class, arrives as ``Foreign`` and equals nothing, whatever its ``__eq__`` says at home.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 100
SMALL = 2**53  # larger integers travel in hexadecimal: Python refuses to read decimals of over 4300 digits


@dataclass(frozen=True)
class Foreign:
    """A value that cannot travel: its type's name is all that is known of it."""

    type_name: str

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


class Malformed(ValueError):
    """Bytes that no honest run sends."""


def encode(value: Any) -> str:
    """A value as one line of JSON; ``decode`` gives it back with the same types."""
    return json.dumps(_tag(value, 0))


def decode(line: str | bytes) -> Any:
    """The value of a line that may come from a hostile process.

    Raises:
        Malformed: it is not what ``encode`` writes.
    """
    try:
        return _untag(json.loads(line), 0)
    except (ValueError, TypeError, RecursionError, KeyError) as why:
        raise Malformed(f"{type(why).__name__}: {why}"[:200]) from None


def same(a: Any, b: Any) -> bool:
    """Whether two decoded values are equal in type and value, all the way down. NaN equals nothing; 1 is not True."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(key in b and same(value, b[key]) for key, value in a.items()) and _keys(a, b)
    if isinstance(a, (set, frozenset)):
        return a == b and _keys(a, b)
    return bool(a == b)


def _keys(a: Any, b: Any) -> bool:
    """Equal keys may still differ in type: 1 and True and 1.0 find each other in a dict."""
    types = {key: type(key) for key in b}
    return all(types.get(key) is type(key) for key in a)


def _tag(value: Any, depth: int) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -SMALL < value < SMALL else {"int": hex(value)}
    if depth >= MAX_DEPTH:
        return {"foreign": "nested too deeply"}
    if kind is list:
        return [_tag(item, depth + 1) for item in value]
    if kind is tuple or kind is set or kind is frozenset:
        return {kind.__name__: [_tag(item, depth + 1) for item in value]}
    if kind is dict:
        return {"dict": [[_tag(key, depth + 1), _tag(item, depth + 1)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
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
