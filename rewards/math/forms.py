r"""Answers read into shapes: one value, a list, a set, a tuple or interval, a union, a matrix, a relation, or words.

The values in them are compared by a function that is passed in (``compare.py``), so that the exact path and the
worker's computer algebra system use the same rules.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace

from rewards.math import families, language, regions
from rewards.math.names import FIGURE, name_of
from rewards.math.shapes import CLOSING, OPENING, TOKEN, Form, encloses, members, sides_of, split
from rewards.math.text import PLAIN, canonical
from rewards.math.text_errors import Unreadable

SEPARATOR = re.compile(
    r"\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\(?:vee|wedge)(?![A-Za-z])"
)
MATRIX = re.compile(
    r"(?P<factor>.*?)\s*\\begin\{([pbB]?)matrix\}(?P<cells>.*)\\end\{\2matrix\}(?P<turned>\s*\^\s*\{?\s*(?:T|\\top)\s*\}?)?",
    re.DOTALL,
)
PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
POINT = re.compile(r"[ABDEHIKLMNQRSTVWXYZ]\s*(\((?:[^()]|\([^()]*\))*,(?:[^()]|\([^()]*\))*\))")  # A(1, 2)
SET = re.compile(r"\\\{.*?\\\}", re.DOTALL)


def read(piece: str) -> Form:
    """The form of a model's piece.

    Raises:
        Unreadable: it has none.
    """
    text = canonical(piece)
    if PLAIN.fullmatch(text):
        return Form("value", text)
    if choice := language.choice(text):
        return _choice(*choice)
    return _read(text)


def read_gold(piece: str) -> Form:
    """The form of a gold answer; words and notation that cannot be computed with are compared as written."""
    text = canonical(piece)
    if PLAIN.fullmatch(text):
        return Form("value", text)
    with contextlib.suppress(Unreadable):  # "(A) and (B)" is words
        if choice := language.choice(text):
            return _choice(*choice)
    if regions.REALS.fullmatch(text):
        return regions.LINE
    if language.is_words(text) or language.RATIO.fullmatch(text):
        return Form("words", text)
    return _read(text)


def _choice(letter: str, rest: str) -> Form:
    """An option's letter with the option's own text, which is a value or words."""
    try:
        option = _read(rest) if rest and not language.is_words(rest) else Form("words", rest)
    except Unreadable:
        option = Form("words", rest)
    return Form("choice", letter, (option,))


def _read(text: str, in_brackets: bool = False) -> Form:
    text = text.strip()
    if not text:
        raise Unreadable("an empty place in the answer")
    if not in_brackets and (found := families.domain(text)):
        rest, name, kind = found
        return Form("family", f"{name}:{kind}", (_read(rest),))
    if not in_brackets and (modular := families.residue(text)):
        return families.check(Form("residue", items=(_read(modular[0]), Form("value", modular[1]))))
    parts = split(SEPARATOR.sub(";", text), {",", ";"}, in_brackets)
    if len(parts) > 1:
        parts = [part for i, part in enumerate(parts) if part.strip() or i in (0, len(parts) - 1)]  # ", and"
        joined = {word for joint in SEPARATOR.findall(text) for word in JOINTS if word in joint}
        items = tuple(item for part in parts for item in members(_read(part, in_brackets)))
        word = "and" if joined & {"and", "wedge"} else "or" if joined else ""
        return Form("list", word, items)
    if PLUS_MINUS.search(SET.sub("", text)) and not _bare_set(text):
        return Form("list", items=tuple(_read(_choose(text, sign), in_brackets) for sign in ("+-", "-+")))
    sides, signs = sides_of(text)
    if signs:
        return Form("relation", items=tuple(_read(side) for side in sides), signs=signs)
    return _read_term(text)


JOINTS = ("and", "or", "vee", "wedge")


def _choose(text: str, sign: str) -> str:
    return PLUS_MINUS.sub(lambda command: sign[0] if command[0] == r"\pm" else sign[1], text)


def _read_term(text: str) -> Form:
    if regions.REALS.fullmatch(text):
        return regions.LINE
    parts = split(text, {r"\cup"})
    if len(parts) > 1:
        return Form("union", items=tuple(_read_term(part.strip()) for part in parts))
    if region := _without(text):
        return region
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Form("set")
    if matrix := MATRIX.fullmatch(text):
        return _matrix(matrix)
    if text.startswith("{") and (inside := _bare_set(text) or _group(text)):
        if built := regions.built(inside):
            return _built(*built)
        form = _read(inside, bool(_bare_set(text)))
        if form.kind == "list" and _bare_set(text):
            return Form("set", items=members(form))
        return replace(form, braced=True)
    if FIGURE.fullmatch(text):
        return Form("value", text)
    if point := POINT.fullmatch(text):
        return _read_term(point[1])
    ratio = split(text, {":"})
    if len(ratio) > 1 and not language.TIME.fullmatch(text):
        return Form("tuple", ":", tuple(_read_term(part.strip()) for part in ratio if part.strip()))
    tokens = TOKEN.findall(text)
    if tokens and tokens[0] in OPENING - {"{"} and tokens[-1] in CLOSING and encloses(tokens):
        return _bracketed(text, tokens)
    grouped = bool(re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", text))
    return Form("value", text, grouped=grouped)


def _bracketed(text: str, tokens: list[str]) -> Form:
    inside = text[len(tokens[0]) : len(text) - len(tokens[-1])]
    kind = "set" if tokens[0] == r"\{" else "tuple"
    if kind == "set" and tokens[-1] == r"\}" and (built := regions.built(inside)):
        return _built(*built)
    form = _read(inside, True) if inside.strip() else Form("list")
    if kind == "set" and tokens[-1] == r"\}":
        return Form("set", items=members(form))
    if form.kind == "list" and kind == "tuple" and tokens[-1] != r"\}":
        brackets = tokens[0] + tokens[-1]
        return Form("tuple", "()" if brackets == r"\langle\rangle" else brackets, form.items)
    if form.kind != "value" or tokens[0] + tokens[-1] != "()":
        raise Unreadable("brackets that do not match")
    return form


def _built(name: str, condition: str) -> Form:
    r"""The region of ``\{x \mid condition\}``, or the elements of ``\{x \mid x = 1\}``."""
    form = _read(condition)
    region = regions.as_region(form)
    if region and region[0] == name:
        return region[1]
    family = form if form.kind == "family" else None
    form = family.items[0] if family else form
    if form.kind == "relation" and form.signs == ("=",) and name_of(form.items[0]) == name:
        return replace(family, items=form.items[1:]) if family else Form("set", items=members(form.items[1]))
    raise Unreadable("set-builder notation whose condition is no interval")


def _without(text: str) -> Form | None:
    r"""``A \setminus \{1, 2\}`` and ``\mathbb{R} - \{1\}`` as intervals."""
    parts = split(text, {r"\setminus"})
    if len(parts) == 1 and (minus := re.fullmatch(r"(\\mathbb\{R\})\s*-\s*(\\\{.*\\\})", text)):
        parts = [minus[1], minus[2]]
    if len(parts) != 2:
        return None
    base, points = _read_term(parts[0].strip()), _read_term(parts[1].strip())
    if points.kind == "value" and regions.position(points.text) is not None:
        points = Form("set", items=(points,))
    if (
        base.kind not in ("tuple", "union")
        or points.kind != "set"
        or any(item.kind != "value" for item in points.items)
    ):
        raise Unreadable("a difference of sets that are no intervals and points")
    return regions.without_points(base, [item.text for item in points.items])


def _bare_set(text: str) -> str:
    """What stands between bare braces that hold a list, ``{1, 2}``; "" where they hold one value."""
    inside = _group(text)
    if not inside or re.fullmatch(r"\s*[0-9]{1,3}(?:,[0-9]{3})+\s*", inside):
        return ""
    return inside if len(split(inside, {",", ";"}, True)) > 1 else ""


def _group(text: str) -> str:
    """What stands between the braces around it all; "" where there are none."""
    if not (text.startswith("{") and text.endswith("}")):
        return ""
    tokens = TOKEN.findall(text)
    return text[1:-1].strip() if tokens[-1] == "}" and encloses(tokens) else ""


def _matrix(match: re.Match[str]) -> Form:
    rows = [
        [cell.strip() for cell in row.split("&")] for row in re.split(r"\\\\", match["cells"].strip()) if row.strip()
    ]
    factor = re.sub(r"\s*\\(?:cdot|times)\s*$", "", match["factor"]).strip()
    if factor:
        factor = "-1" if factor == "-" else factor
        rows = [[f"({factor}) \\cdot ({cell})" for cell in row] for row in rows]
    if match["turned"]:
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("a matrix with rows of several lengths")
        rows = [list(row) for row in zip(*rows, strict=True)]
    return Form("matrix", items=tuple(Form("row", items=tuple(Form("value", cell) for cell in row)) for row in rows))
