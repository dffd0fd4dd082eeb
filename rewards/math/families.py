r"""Answers for every integer (``k\pi, k \in \mathbb{Z}``) and residues (``3 \pmod 5``).

A family is read as what it says of its parameter. Two are the same if renaming the parameter, turning its sign and
shifting it by an integer makes one the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rewards.math import exact, expression, regions
from rewards.math.shapes import Form
from rewards.math.text_errors import Unreadable

DOMAIN = re.compile(
    r"(?P<rest>.+?)\s*(?:[,;:(|]|\\text\{[ ,]*(?:where|with|for|for all|for any|for every|and)? ?\}|(?<=\s))\s*\(?\s*"
    r"(?:(?:where|for (?:all|any|every)?)\s+|\\forall\s*|\\quad\s*)?(?P<name>[a-z])\s*"
    r"(?:\\in\s*(?:\\mathbb\{(?P<set>[ZN])\}|(?P<letter>[ZN]))(?:\s*(?:\^\s*\{?\s*[+*]\s*\}?|_\s*\{?\s*[+0]\s*\}?))?"
    r"|(?:\\text\{)?\s*(?:is )?(?:an? |any )?(?P<word>(?:positive |non-?negative )?integer|whole number|natural number)"
    r"\s*\}?)\s*\)?\s*\.?",
    re.DOTALL,
)
ANY_INTEGER = re.compile(
    r"(?P<rest>.+?)\s*[,;(]?\s*(?:\\text\{)?[ ,(]*(?:where|for)?\s*(?:any|all|every)?\s*(?:integers?)\s*\}?\s*"
    r"(?P<name>[a-z])\s*\)?",
    re.DOTALL,
)
RESIDUE = re.compile(
    r"(?P<rest>.+?)\s*(?:\\pmod\s*(?:\{(?P<a>[^{}]+)\}|(?P<b>[0-9]+|[a-z])(?![0-9A-Za-z]))"
    r"|(?:\(\s*(?:\\pmod|\\text\{ ?mod ?\}|mod)|\\text\{ ?\( ?mod ?\})\s*\{?(?P<c>[^{}()]+)\}?\s*\)"
    r"|\\bmod\s*\{?(?P<d>[0-9]+|[a-z])\}?)\s*",
    re.DOTALL,
)


def domain(text: str) -> tuple[str, str, str] | None:
    """What is said of a parameter, its name and its set, "Z" or "N"; None where there is none."""
    if r"\in" not in text and "integer" not in text and "number" not in text:
        return None
    match = DOMAIN.fullmatch(text)
    if match is None:
        match = ANY_INTEGER.fullmatch(text)
        return (match["rest"], match["name"], "Z") if match and _occurs(match["name"], match["rest"]) else None
    kind = match["set"] or match["letter"] or ("Z" if match["word"] == "integer" else "N")
    return (match["rest"].rstrip(" ,;"), match["name"], kind) if _occurs(match["name"], match["rest"]) else None


def residue(text: str) -> tuple[str, str] | None:
    r"""The residue and the modulus of ``x \equiv 3 \pmod 5``; None for all else."""
    if "mod" not in text:
        return None
    match = RESIDUE.fullmatch(text)
    if match is None or "mod" in match["rest"]:
        return None
    return match["rest"].rpartition(r"\equiv")[2].strip(), (
        match["a"] or match["b"] or match["c"] or match["d"]
    ).strip()


def _occurs(name: str, text: str) -> bool:
    return bool(_of(name).search(text))


def _of(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z\\]){name}(?![A-Za-z_]|\s*\\in)")


def same_family(gold: Form, answer: Form, same: Callable[[Form, Form], bool]) -> bool:
    """Whether two families are the same; one of them may leave the parameter's set out."""
    family = gold if gold.kind == "family" else answer
    name, kind = family.text.split(":")
    if gold.kind != answer.kind:
        region = regions.as_region(family.items[0])  # -2 < x < 3 is no more what it was without x being an integer
        plain = [form.items[0] if form is family else form for form in (gold, answer)]
        return not (region and region[0] == name) and same(plain[0], plain[1])
    other, other_kind = answer.text.split(":")
    if kind != other_kind:
        return False
    golds, answers = _parts(gold.items[0]), _parts(answer.items[0])
    if len(golds) != len(answers):
        return False
    left = list(answers)
    for item in golds:
        found = next(
            (i for i, candidate in enumerate(left) if _same_part(item, candidate, name, other, kind, same)), None
        )
        if found is None:
            return False
        del left[found]
    return True


def _parts(form: Form) -> tuple[Form, ...]:
    return form.items if form.kind in ("list", "union") else (form,)


def _same_part(gold: Form, answer: Form, name: str, other: str, kind: str, same: Callable[[Form, Form], bool]) -> bool:
    for sign in (1, -1) if kind == "Z" else (1,):
        shift = _shift(gold, answer, name, other, sign) if kind == "Z" else 0
        parameter = f"({'-' if sign < 0 else ''}{name}+({shift or 0}))" if shift or sign < 0 else name
        if same(gold, substituted(answer, other, parameter)):
            return True
    return False


def _shift(gold: Form, answer: Form, name: str, other: str, sign: int) -> int | None:
    """The integer s for which the answer at ``sign k + s`` may be the gold answer at k, from their first values."""
    first, second = _first_value(gold), _first_value(answer)
    try:
        at_zero = [expression.value(substituted_text(text, n, "(0)")) for text, n in ((first, name), (second, other))]
        step = expression.value(substituted_text(second, other, "(1)")) - at_zero[1]
        difference = at_zero[0] - at_zero[1]
        shift = (difference / step).rational
    except (ValueError, ZeroDivisionError):
        return None
    if shift is None and difference.bottom == step.bottom:
        shift = exact.ratio(difference, step)
    return int(shift) if shift is not None and shift.denominator == 1 and abs(shift) < 10**6 else None


def _first_value(form: Form) -> str:
    while form.items:
        form = form.items[-1] if form.kind == "relation" else form.items[0]
    return form.text


def substituted(form: Form, name: str, by: str) -> Form:
    """A form with another formula in place of a variable."""
    items = tuple(substituted(item, name, by) for item in form.items)
    text = substituted_text(form.text, name, by) if form.kind == "value" else form.text
    return Form(form.kind, text, items, form.signs, form.grouped)


def substituted_text(text: str, name: str, by: str) -> str:
    return _of(name).sub(lambda _: by, text)


def same_residue(gold: Form, answer: Form, same: Callable[[Form, Form], bool]) -> bool:
    """Equal moduli, and residues that differ by a multiple. Equal residues may leave the modulus out."""
    if gold.kind != answer.kind:
        plain = [form.items[0] if form.kind == "residue" else form for form in (gold, answer)]
        return same(plain[0], plain[1])
    if not same(gold.items[1], answer.items[1]):
        return False
    modulus = _integer(gold.items[1])
    golds, answers = _parts(gold.items[0]), _parts(answer.items[0])
    left = list(answers)
    for item in golds:
        found = next((i for i, other in enumerate(left) if _congruent(item, other, modulus) or same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return not left


def _congruent(a: Form, b: Form, modulus: int | None) -> bool:
    left, right = _integer(a), _integer(b)
    return bool(modulus) and left is not None and right is not None and (left - right) % modulus == 0


def _integer(form: Form) -> int | None:
    if form.kind != "value":
        return None
    try:
        value = expression.value(form.text).rational
    except ValueError:
        return None
    return int(value) if value is not None and value.denominator == 1 else None


def check(form: Form) -> Form:
    """Raises Unreadable for a residue to the modulus 0."""
    if form.kind == "residue" and _integer(form.items[1]) == 0:
        raise Unreadable("a residue to the modulus 0")
    return form
