r"""Names and labels on the left of an equals sign: ``x``, ``f(2)``, ``AB``, ``|AB|``, ``\cos A``, ``a+b``.

A label says which quantity a value is, and may be left out or added. ``x+1 = 5`` has none: who is asked for x has
another answer. So has a curve: ``x+y = 3`` as a row's answer is an equation, not 3.
"""

from __future__ import annotations

import re

from rewards.math.shapes import Form
from rewards.math.text import as_written
from rewards.math.units import is_sum

NAME = re.compile(
    r"(?:\\?[A-Za-z]|\\[a-z]{2,8}|\\text\{\s*[A-Za-z ]+\})'*(?:_\{?[A-Za-z0-9]+\}?)?'*"
    r"(?:\s*(?:\^\{-1\})?\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?"
)
CONSTANTS = (r"\pi", r"\infty", "e", "i")
FIGURE = (
    re.compile(  # |AB|, \overline{AB}, \angle ABC, m\angle A, [ABC], S_{\triangle ABC}, \vec{a}, |z|, \triangle ABC
        r"(?:m ?)?(?:\\(?:angle|measuredangle|triangle|overline|overrightarrow|vec|bar|hat|widehat|text)\s*\{?\s*)+"
        r"[A-Za-z]{1,5}'?\s*\}?"
        r"|[A-Z]'?(?:_\{?[0-9]\}?)?(?: ?[A-Z]'?(?:_\{?[0-9]\}?)?){1,4}|\[\s*[A-Z]{3,6}\s*\]"
        r"|\|\s*(?:\\(?:overline|overrightarrow|vec)\s*\{?\s*)?(?:[A-Z]{1,2}|[wz])\s*\}?\s*\|"
        r"|\|\s*\\vec\s*\{?\s*[a-z]\s*\}?\s*\|"
        r"|[A-Z]_\s*\{?\s*(?:\\triangle\s*)?(?:[A-Z]{2,6}|\\text\{[A-Za-z ]+\}|\\[a-z]+)\s*\}?"
        r"|[A-Za-z](?:_\s*\{?\s*\\(?:text\{[A-Za-z ]+\}|max|min)\s*\}?)"
    )
)
CALL = re.compile(
    r"(?:[fghpqrstuvFGHPEVDTSLQNRCA]|\\text\{[A-Za-z ]+\}|\\operatorname\{\w+\})'*(?:_\{?\w+\}?)?"
    r"(?:\s*\^\s*\{?-?1\}?)?\s*\((.*)\)"
)
POINT = re.compile(r"[a-zA-Z]'*\s*\(\s*-?[0-9/.]+\s*\)")  # y(0)
COMPUTED = re.compile(
    r"\\(?:sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|lim|sum|int|prod|max|min|gcd|lcm|det|nabla|Pr|Re|Im)(?![A-Za-z])"
)
BOUND = re.compile(r"\\(?:lim|sum|int|prod|max|min|gcd|lcm|det|nabla|Pr)(?![A-Za-z])")
DERIVATIVE = re.compile(
    r"\\frac\s*\{\s*(?:d|\\partial)[^{}]*\}\s*\{\s*(?:d|\\partial)[^{}]*\}(?:\s*[a-z]?\(?[a-z]?\)?)"
)
VARIABLE = re.compile(r"\\(?:text|operatorname)\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z](?:_(?:\{\w+\}|\w))?")
GREEK = re.compile(r"\\(?:alpha|beta|gamma|delta|theta|phi|varphi|lambda|mu|sigma|omega|rho|tau)$")


def name_of(form: Form) -> str:
    r"""The name that a value is: ``x``, ``\theta``, ``a_1``, ``f(x)``; "" where it is something else."""
    if form.kind == "value" and NAME.fullmatch(form.text) and form.text not in CONSTANTS:
        return as_written(form.text)
    return ""


def label_of(form: Form, *, of_gold: bool = False) -> str:
    """The quantity that a left side names; "" where it is a number, or an equation to solve or of a curve."""
    if form.kind != "value":
        return ""
    if name := name_of(form):
        return name
    text = form.text.strip()
    call = CALL.fullmatch(text)
    if FIGURE.fullmatch(text) or DERIVATIVE.fullmatch(text) or POINT.fullmatch(text):
        return _bare(text)
    if COMPUTED.match(text) and not is_sum(text) and (BOUND.match(text) or not variables(text) <= {"x", "y", "z"}):
        return _bare(text)
    if call and call[1].count("(") == call[1].count(")"):
        return _bare(text)
    letters = variables(text)
    if len(letters) < 2 or (of_gold and letters & {"x", "y"}):
        return ""
    return _bare(text)


def variables(text: str) -> set[str]:
    """The variables of a formula."""
    found = {match[0] for match in VARIABLE.finditer(text)} - {"e", "i"}
    return {name for name in found if name[0] != "\\" or GREEK.fullmatch(name)}


def _bare(text: str) -> str:
    """A label for comparison: ``|AB|`` is ``AB``, ``\\cos(A)`` is ``\\cos A``."""
    text = re.sub(r"\\overline(?![A-Za-z])", "", as_written(text))
    return re.sub(r"[\s{}()|]", "", text)


def named(form: Form, *, of_gold: bool = False) -> tuple[str, Form] | None:
    r"""The name and the rest of ``x = 5``, ``x \in [0, 1]``, ``AB = 4`` or ``(x, y) = (1, 2)``; None for all else."""
    if form.kind != "relation" or form.signs not in (("=",), ("in",)):
        return None
    left, right = form.items
    if left.kind == "tuple" and left.text == "()" and all(map(name_of, left.items)):
        return ",".join(map(name_of, left.items)), right
    if name := name_of(left):
        return name, right
    label = label_of(left, of_gold=of_gold)
    if not label and form.signs == ("=",) and left.kind == "value" and not variables(left.text):
        left, right = right, left  # 4 = AB
        label = label_of(left, of_gold=of_gold)
    if not label or form.signs != ("=",):
        return None
    quantity = len(variables(left.text)) > 1 and not FIGURE.fullmatch(left.text) and not DERIVATIVE.fullmatch(left.text)
    equation = right.kind == "value" and (variables(right.text) or right.text.strip() == "0")
    if quantity and equation and not CALL.fullmatch(left.text) and not BOUND.match(left.text):
        return None  # a + b = 2c, ax + by + c = 0
    return label, right


def without_names(items: tuple[Form, ...]) -> tuple[Form, ...] | None:
    """``x = 1`` and ``x = 2``, or ``x_1 = 1`` and ``x_2 = 2``, as values; None for other names or relations."""
    found = [named(item) for item in items]
    names = {name[0] for name in found if name}
    if len(names) > 1 and not same_root(names):
        return None
    plain = tuple(name[1] if name else item for name, item in zip(found, items, strict=True))
    return None if any(item.kind == "relation" for item in plain) else plain


def same_root(names: set[str]) -> bool:
    """Whether names differ in their numbers alone: ``x_1``, ``x_2``."""
    return len({re.sub(r"_\{?[0-9]+\}?$", "", name) for name in names}) == 1 and all("_" in name for name in names)


def root_of(form: Form) -> str:
    """``x`` of ``x = 1`` and of ``x_1 = 1``; "" for all else."""
    found = named(form)
    return re.sub(r"_\{?[0-9]+\}?$", "", found[0]) if found and form.signs == ("=",) else ""


def assignments(form: Form) -> dict[str, Form] | None:
    """The values of several names, in the order of the text: ``x = 1, y = 2`` or ``(x, y) = (1, 2)``; else None."""
    if form.kind == "relation" and form.signs == ("=",):
        left, right = form.items
        if left.kind == right.kind == "tuple" and len(left.items) == len(right.items) and all(map(name_of, left.items)):
            return dict(zip(map(name_of, left.items), right.items, strict=True))
        return None
    if form.kind != "list" or form.text == "or" or any(item.kind != "relation" for item in form.items):
        return None
    found = [named(item) for item in form.items if item.signs == ("=",)]
    names = {pair[0]: pair[1] for pair in found if pair}
    return names if len(names) == len(form.items) > 1 else None
