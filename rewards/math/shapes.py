r"""The shape of an answer, and where its text is split: at commas, relations and unions outside of all brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass

TOKEN = re.compile(r"\\[A-Za-z]+\*?(?:\{[a-zA-Z]*matrix\*?\})?|\\.|[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|.", re.DOTALL)
OPENING, CLOSING = {"(", "[", "{", r"\{", r"\langle"}, {")", "]", "}", r"\}", r"\rangle"}
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", r"\in": "in", r"\approx": "="}
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


@dataclass(frozen=True)
class Form:
    """``kind`` is one of value, list, set, tuple, union, matrix, row, relation, residue, family, choice, words.

    ``text`` is a value's formula, a tuple's two brackets, the word that joins a list, a family's parameter and domain,
    a choice's letter, or words; ``signs`` are a relation's.
    """

    kind: str
    text: str = ""
    items: tuple[Form, ...] = ()
    signs: tuple[str, ...] = ()
    grouped: bool = False  # a value whose commas may group thousands or separate values
    braced: bool = False  # one value in bare braces, which may be TeX's or a set's


def ungrouped(form: Form) -> Form:
    """``100,200`` as two numbers, if it was read as one."""
    if form.kind == "value" and form.grouped:
        return Form("list", items=tuple(Form("value", part) for part in form.text.split(",")))
    return form


def members(form: Form) -> tuple[Form, ...]:
    return form.items if form.kind == "list" else (form,)


def encloses(tokens: list[str]) -> bool:
    """Whether the first bracket is closed by the last token."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token in OPENING) - (token in CLOSING)
        if depth == 0:
            return i == len(tokens) - 1
    return False


def split(text: str, separators: set[str], in_brackets: bool = False) -> list[str]:
    """Parts between separators outside of all brackets. ``1,000`` is one number, or two if ``in_brackets``."""
    parts, depth, start, position = [], 0, 0, 0
    for token in TOKEN.findall(text):
        depth += (token in OPENING or token.startswith(r"\begin")) - (token in CLOSING or token.startswith(r"\end"))
        if depth == 0 and token in separators:
            parts.append(text[start:position])
            start = position + len(token)
        elif depth == 0 and in_brackets and "," in token and "," in separators:
            for digits in token.split(",")[:-1]:
                position += len(digits)
                parts.append(text[start:position])
                position += 1
                start = position
            position += len(token.rpartition(",")[2]) - len(token)
        position += len(token)
    return [*parts, text[start:]]


def sides_of(text: str) -> tuple[list[str], tuple[str, ...]]:
    """The sides of a relation, and its signs."""
    sides, signs, depth, start, position = [], [], 0, 0, 0
    for token in TOKEN.findall(text):
        depth += (token in OPENING or token.startswith(r"\begin")) - (token in CLOSING or token.startswith(r"\end"))
        if depth == 0 and token in RELATIONS:
            sides.append(text[start:position])
            signs.append(RELATIONS[token])
            start = position + len(token)
        position += len(token)
    return [*sides, text[start:]], tuple(signs)
