r"""The shape of an answer: one value, a list, a set, a tuple or interval, a union, a matrix, a relation, or words.

Shapes are read and compared here. The values in them are compared by a function that is passed in, so that the exact
path and the worker's computer algebra system use the same rules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.math.text import Unreadable, as_written, canonical

TOKEN = re.compile(r"\\[A-Za-z]+\*?(?:\{[a-zA-Z]*matrix\*?\})?|\\.|[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|.", re.DOTALL)
OPENING, CLOSING = {"(", "[", "{", r"\{", r"\langle"}, {")", "]", "}", r"\}", r"\rangle"}
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", r"\in": "in", r"\approx": "="}
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
SEPARATOR = re.compile(r"\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
MATRIX = re.compile(r"\\begin\{([pbB]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
NAME = re.compile(
    r"(?:\\?[A-Za-z]|\\[a-z]{2,8}|\\text\{\s*[A-Za-z ]+\})(?:_\{?[A-Za-z0-9]+\}?)?"
    r"(?:\s*(?:\^\{-1\})?\s*\(\s*[A-Za-z]\s*\))?"
)
PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
WORD = re.compile(r"[A-Za-z]{3,}")
WORDS = re.compile(r"[A-Za-z0-9 ,.'&:;?!()/-]+")
CHOICE = re.compile(r"(\(?)([A-Za-z])[).:]?")
SHORT_WORDS = frozenset({"no", "up", "am", "pm", "he", "we", "it", "us"})
TIME = re.compile(r"[0-9]{1,2}:[0-9]{2}( ?[ap]\.? ?m\.?)?", re.IGNORECASE)
RATIO = re.compile(r"[0-9]+(?: ?: ?[0-9]+)+")
# Notation with nothing to compute: compared as it is written, where the gold answer is of this kind.
WRITTEN = re.compile(
    r"\\(?:overline|overrightarrow|angle|triangle|cong|sim|parallel|perp|to|rightarrow|mathbb|mathbf|vec|hat|bar|cap|"
    r"setminus|subset|subseteq|text|ldots|dots|prime|infty|emptyset|pm|begin|end|cup|circ|star|implies|iff)(?![A-Za-z])"
)


@dataclass(frozen=True)
class Form:
    """``kind`` is one of value, list, set, tuple, union, matrix, row, relation, words.

    ``text`` is a value's formula, a tuple's two brackets, the word that joins a list, or words; ``signs`` are a
    relation's.
    """

    kind: str
    text: str = ""
    items: tuple[Form, ...] = ()
    signs: tuple[str, ...] = ()
    grouped: bool = False  # a value whose commas may group thousands or separate values


def read(piece: str) -> Form:
    """The form of a model's piece.

    Raises:
        Unreadable: it has none.
    """
    return _read(canonical(piece))


def read_gold(piece: str) -> Form:
    """The form of a gold answer; words and notation that cannot be computed with are compared as written."""
    text = canonical(piece)
    if is_words(text) or RATIO.fullmatch(text):
        return Form("words", text)
    return _read(text)


def is_written_only(piece: str) -> bool:
    """Whether a gold answer that cannot be read is notation or language ("10:30 a.m.", "2 dozen"), and not broken."""
    try:
        text = canonical(piece)
    except Unreadable:
        return False
    words = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    if TIME.fullmatch(words) or (WORDS.fullmatch(words) and set(WORD.findall(words)) - {"and"}):
        return True
    unknown = re.findall(r"\\[A-Za-z]+", WRITTEN.sub("", text))
    return bool(WRITTEN.search(text)) and not unknown and not re.search(r"[+*/^_=-]\s*$", text)


def is_words(text: str) -> bool:
    """Whether a canonical text is language: "Monday", "(B)", "not enough information"."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    if not WORDS.fullmatch(text):
        return False
    choice = CHOICE.fullmatch(text)
    if choice:
        return len(text) > 1
    starts_with_number = re.match(r"[-(]*\.?[0-9]", text)
    if starts_with_number:
        return False
    return bool(WORD.search(text)) or text.lower() in SHORT_WORDS


def same_words(gold: str, answer: str) -> bool:
    """Words are compared without regard to case, a choice without its brackets."""
    gold, answer = as_written(gold), as_written(answer)
    if gold == answer:
        return True
    choices = CHOICE.fullmatch(gold), CHOICE.fullmatch(answer)
    if choices[0] and choices[1]:
        return choices[0][2].lower() == choices[1][2].lower()
    if not (WORD.search(gold) or TIME.fullmatch(gold) or gold.lower() in SHORT_WORDS):
        return False  # x and X may be two names
    return gold.casefold() == answer.casefold()


def ungrouped(form: Form) -> Form:
    """``100,200`` as two numbers, if it was read as one."""
    if form.kind == "value" and form.grouped:
        return Form("list", items=tuple(Form("value", part) for part in form.text.split(",")))
    return form


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(text: str, in_brackets: bool = False) -> Form:
    text = text.strip()
    if not text:
        raise Unreadable("an empty place in the answer")
    parts = _split(SEPARATOR.sub(";", text), {",", ";"}, in_brackets)
    if len(parts) > 1:
        parts = [part for i, part in enumerate(parts) if part.strip() or i in (0, len(parts) - 1)]  # ", and"
        joined = {word for joint in SEPARATOR.findall(text) for word in ("and", "or") if word in joint}
        members = tuple(item for part in parts for item in _members(_read(part, in_brackets)))
        return Form("list", "and" if "and" in joined else "or" if "or" in joined else "", members)
    if PLUS_MINUS.search(text):
        return Form("list", items=tuple(_read(_choose(text, sign), in_brackets) for sign in ("+-", "-+")))
    sides, signs = _relation(text)
    if signs:
        return Form("relation", items=tuple(_read(side) for side in sides), signs=signs)
    return _read_term(text)


def _members(form: Form) -> tuple[Form, ...]:
    return form.items if form.kind == "list" else (form,)


def _choose(text: str, sign: str) -> str:
    return PLUS_MINUS.sub(lambda command: sign[0] if command[0] == r"\pm" else sign[1], text)


def _read_term(text: str) -> Form:
    parts = _split(text, {r"\cup"})
    if len(parts) > 1:
        return Form("union", items=tuple(_read_term(part.strip()) for part in parts))
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Form("set")
    if matrix := MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\", matrix[2].strip()) if row.strip()]
        return Form("matrix", items=tuple(_row(row) for row in rows))
    tokens = TOKEN.findall(text)
    if tokens and tokens[0] in OPENING - {"{"} and tokens[-1] in CLOSING and _encloses(tokens):
        inside = text[len(tokens[0]) : len(text) - len(tokens[-1])]
        kind = "set" if tokens[0] == r"\{" else "tuple"
        form = _read(inside, True) if inside.strip() else Form("list")
        if kind == "set" and tokens[-1] == r"\}":
            return Form("set", items=_members(form))
        if form.kind == "list" and kind == "tuple" and tokens[-1] != r"\}":
            brackets = tokens[0] + tokens[-1]
            return Form("tuple", "()" if brackets == r"\langle\rangle" else brackets, form.items)
        if form.kind != "value" or tokens[0] + tokens[-1] != "()":
            raise Unreadable("brackets that do not match")
        return form
    grouped = bool(re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", text))
    return Form("value", text, grouped=grouped)


def _row(text: str) -> Form:
    return Form("row", items=tuple(Form("value", cell.strip()) for cell in text.split("&")))


def _encloses(tokens: list[str]) -> bool:
    """Whether the first bracket is closed by the last token."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token in OPENING) - (token in CLOSING)
        if depth == 0:
            return i == len(tokens) - 1
    return False


def _split(text: str, separators: set[str], in_brackets: bool = False) -> list[str]:
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


def _relation(text: str) -> tuple[list[str], tuple[str, ...]]:
    sides, signs, depth, start, position = [], [], 0, 0, 0
    for token in TOKEN.findall(text):
        depth += (token in OPENING or token.startswith(r"\begin")) - (token in CLOSING or token.startswith(r"\end"))
        if depth == 0 and token in RELATIONS:
            sides.append(text[start:position])
            signs.append(RELATIONS[token])
            start = position + len(token)
        position += len(token)
    return [*sides, text[start:]], tuple(signs)


# --- names, intervals ------------------------------------------------------------------------------------------------


def name_of(form: Form) -> str:
    r"""The name that a value is: ``x``, ``\theta``, ``a_1``, ``f(x)``; "" where it is something else."""
    if form.kind == "value" and NAME.fullmatch(form.text) and form.text not in (r"\pi", r"\infty", "e", "i"):
        return as_written(form.text)
    return ""


def named(form: Form) -> tuple[str, Form] | None:
    r"""The name and the rest of ``x = 5``, ``x \in [0, 1]`` or ``(x, y) = (1, 2)``; None for all else."""
    if form.kind != "relation" or form.signs not in (("=",), ("in",)):
        return None
    left, right = form.items
    if left.kind == "tuple" and left.text == "()" and all(map(name_of, left.items)):
        return ",".join(map(name_of, left.items)), right
    return (name_of(left), right) if name_of(left) else None


def as_interval(form: Form) -> tuple[str, Form] | None:
    """The name and the interval of ``x > 3`` or ``1 < x <= 2``; None for all else."""
    if form.kind != "relation" or any(item.kind != "value" for item in form.items):
        return None
    items, signs = form.items, form.signs
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
    """The same for a list of inequalities of one name ("x < 1 or x > 3"): a union."""
    if form.kind == "relation" and form.signs == ("in",) and form.items[1].kind in ("tuple", "union"):
        return named(form)
    if form.kind != "list" or form.text == "and":
        return as_interval(form)
    parts = [as_interval(item) for item in form.items]
    names = {part[0] for part in parts if part}
    if None in parts or len(names) != 1:
        return None
    return names.pop(), Form("union", items=tuple(part[1] for part in parts if part))


def without_names(items: tuple[Form, ...]) -> tuple[Form, ...] | None:
    """``x = 1`` and ``x = 2`` as values; None where the names differ or there are other relations."""
    found = [named(item) for item in items]
    if len({name[0] for name in found if name}) > 1:
        return None
    plain = tuple(name[1] if name else item for name, item in zip(found, items, strict=True))
    return None if any(item.kind == "relation" for item in plain) else plain
