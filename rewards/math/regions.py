r"""Sets of real numbers: intervals, inequalities, set-builder notation, ``\mathbb{R} \setminus \{1\}``.

All of them are read as one interval or a union of intervals.
"""

from __future__ import annotations

import re

from rewards.math import expression, functions
from rewards.math.exact import NotExact
from rewards.math.names import name_of, named
from rewards.math.shapes import FLIPPED, Form
from rewards.math.text_errors import Unreadable

LINE = Form("tuple", "()", (Form("value", r"-\infty"), Form("value", r"\infty")))
REALS = re.compile(
    r"\\mathbb\{R\}|\\text\{ ?(?:all )?reals?(?: numbers)? ?\}|(?:all|the) real numbers|all reals", re.IGNORECASE
)
BUILDER = re.compile(
    r"\s*(?P<name>\\?[A-Za-z]+)\s*(?:\\in\s*(?:\\mathbb\{R\}|R(?![A-Za-z])))?\s*"
    r"(?:\||:|\\text\{ such that \})\s*(?P<rest>.+)",
    re.DOTALL,
)
REAL_NUMBER = re.compile(r"\s*(?:,|\\text\{,? ?and ?\})\s*\\?[a-z]+\s*\\in\s*(?:\\mathbb\{R\}|R)\s*$")


def as_interval(form: Form) -> tuple[str, Form] | None:
    """The name and the interval of ``x > 3``, ``1 < x <= 2`` or ``x != 1``; None for all else."""
    if form.kind != "relation" or any(item.kind != "value" for item in form.items):
        return None
    items, signs = form.items, form.signs
    if signs == ("!=",) and name_of(items[0]) and not name_of(items[1]):
        return name_of(items[0]), without_points(LINE, [items[1].text])
    if {">", ">="} & set(signs):
        items, signs = items[::-1], tuple(FLIPPED.get(sign, sign) for sign in signs[::-1])
    if not set(signs) <= {"<", "<="}:
        return None
    low, high = Form("value", r"-\infty"), Form("value", r"\infty")
    brackets = ["(", ")"]
    if len(items) == 3 and name_of(items[1]):
        name, low, high = name_of(items[1]), items[0], items[2]
        brackets = ["(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"]
    elif len(items) == 2 and name_of(items[0]) and not name_of(items[1]):
        name, high, brackets[1] = name_of(items[0]), items[1], ")" if signs[0] == "<" else "]"
    elif len(items) == 2 and name_of(items[1]) and not name_of(items[0]):
        name, low, brackets[0] = name_of(items[1]), items[0], "(" if signs[0] == "<" else "["
    else:
        return None
    return name, Form("tuple", "".join(brackets), (low, high))


def as_region(form: Form) -> tuple[str, Form] | None:
    """The same for several conditions on one name: "x < 1 or x > 3" is a union, "x > 1 and x < 3" an interval."""
    if form.kind == "relation" and form.signs == ("in",) and form.items[1].kind in ("tuple", "union"):
        return named(form)
    if form.kind != "list":
        return as_interval(form)
    points = [item.items for item in form.items if item.kind == "relation" and item.signs == ("!=",)]
    rest = [item for item in form.items if item.kind != "relation" or item.signs != ("!=",)]
    if points and form.text != "or" and all(name_of(left) for left, _ in points):
        name = name_of(points[0][0])
        base = _met(rest, name) if rest else LINE
        if base is None or {name_of(left) for left, _ in points} != {name}:
            return None
        return name, without_points(base, [right.text for _, right in points])
    parts = [as_interval(item) for item in form.items]
    names = {part[0] for part in parts if part}
    if None in parts or len(names) != 1:
        return None
    if form.text == "and":
        met = _met(list(form.items), next(iter(names)))
        return (names.pop(), met) if met else None
    return names.pop(), Form("union", items=tuple(part[1] for part in parts if part))


def _met(conditions: list[Form], name: str) -> Form | None:
    """The interval on which one or two conditions on a name hold: "x > 1 and x < 3"."""
    found = [as_region(condition) for condition in conditions]
    if any(part is None or part[0] != name or part[1].kind != "tuple" for part in found):
        return None
    intervals = [part[1] for part in found if part]
    if len(intervals) == 1:
        return intervals[0]
    if len(intervals) != 2:
        return None
    first, second = sorted(intervals, key=lambda interval: interval.items[0].text != r"-\infty")
    if first.items[0].text != r"-\infty" or second.items[1].text != r"\infty" or first.items[1].text == r"\infty":
        return None
    if not position(second.items[0].text) < position(first.items[1].text):
        return None
    return Form("tuple", second.text[0] + first.text[1], (second.items[0], first.items[1]))


def built(inside: str) -> tuple[str, str] | None:
    r"""The name and the condition in ``\{x \mid condition\}``; None where it is no set-builder notation."""
    match = BUILDER.fullmatch(inside)
    return (match["name"], REAL_NUMBER.sub("", match["rest"])) if match else None


def without_points(region: Form, points: list[str]) -> Form:
    """An interval or union without some points.

    Raises:
        Unreadable: where a point or an end lies is not known.
    """
    pieces = list(region.items if region.kind == "union" else (region,))
    for point in sorted(set(points), key=position):
        at = position(point)
        for i, piece in enumerate(pieces):
            if piece.kind != "tuple" or len(piece.items) != 2:
                raise Unreadable("points taken away from something else than intervals")
            low, high = (position(end.text) for end in piece.items)
            if at in (low, high):
                brackets = ("(" if at == low else piece.text[0]) + (")" if at == high else piece.text[1])
                pieces[i] = Form("tuple", brackets, piece.items)
            elif low < at < high:
                end = Form("value", point)
                left = Form("tuple", piece.text[0] + ")", (piece.items[0], end))
                pieces[i : i + 1] = [left, Form("tuple", "(" + piece.text[1], (end, piece.items[1]))]
                break
    return pieces[0] if len(pieces) == 1 else Form("union", items=tuple(pieces))


def position(text: str) -> float:
    """Where a number stands on the line. Raises Unreadable."""
    bare = text.replace(" ", "").removeprefix("+")
    if bare in (r"\infty", r"-\infty"):
        return float(bare.replace(r"\infty", "inf"))
    try:
        return functions.real_value(expression.value(text))
    except (NotExact, ArithmeticError, ValueError) as why:
        raise Unreadable(f"where {text!r} lies is not known") from why
