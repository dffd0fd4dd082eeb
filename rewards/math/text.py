r"""An answer's text made canonical: texts that look the same become the same (spacing, fractions, synonyms, Unicode).

Nothing is computed here. Texts that a reader would tell apart stay apart: ``1 2`` is not ``12``, but ``5\,000`` is
``5000``.
"""

from __future__ import annotations

import re
from functools import lru_cache

from rewards.math import markup
from rewards.math.numbers import with_bases
from rewards.math.text_errors import Unreadable

__all__ = ["Unreadable", "as_written", "canonical"]

MAX_LENGTH = 512  # characters
MAX_DEPTH = 50  # braces and brackets


UNICODE = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u2010": "-",
        "\u2011": "-",
        "\u00d7": r"\times ",
        "\u22c5": r"\cdot ",
        "\u00b7": r"\cdot ",
        "\u00f7": r"\div ",
        "\u2044": "/",
        "\u221e": r"\infty ",
        "\u2264": r"\leq ",
        "\u2265": r"\geq ",
        "\u2260": r"\neq ",
        "\u2248": r"\approx ",
        "\u222a": r"\cup ",
        "\u2229": r"\cap ",
        "\u2208": r"\in ",
        "\u2205": r"\emptyset ",
        "\u211d": r"\mathbb{R}",
        "\u00b1": r"\pm ",
        "\u00b0": r"^\circ ",
        "\u03c0": r"\pi ",
        "\u03b8": r"\theta ",
        "\u03b1": r"\alpha ",
        "\u03b2": r"\beta ",
        "\u03bb": r"\lambda ",
        "\u03bc": r"\mu ",
        "\u00bd": r"\frac{1}{2}",
        "\u00bc": r"\frac{1}{4}",
        "\u00be": r"\frac{3}{4}",
        "\u2153": r"\frac{1}{3}",
        "\u2154": r"\frac{2}{3}",
        "\u2155": r"\frac{1}{5}",
        "\u215b": r"\frac{1}{8}",
        "\u215c": r"\frac{3}{8}",
        "\u215d": r"\frac{5}{8}",
        "\u215e": r"\frac{7}{8}",
        "\u2124": r"\mathbb{Z}",
        "\u2115": r"\mathbb{N}",
        "\u211a": r"\mathbb{Q}",
        "\u2102": r"\mathbb{C}",
        "\u2216": r"\setminus ",
        "\u2261": r"\equiv ",
        "\u27e8": r"\langle ",
        "\u27e9": r"\rangle ",
        "\u2032": "'",
        "\u2033": "''",
        "\uff0c": ", ",
        "\u3001": ", ",
        "\uff08": "(",
        "\uff09": ")",
        "\uff1a": ":",
        "\uff1b": ";",
        "\uff1d": "=",
        "\uff0b": "+",
        "\uff0d": "-",
        "\u3002": ".",
        "\u2220": r"\angle ",
        "\u25b3": r"\triangle ",
        "\u2209": r"\notin ",
        "\u223c": "~",
        "\u221a": r"\sqrt ",
        "\u00a0": r"\,",
        "\u2009": r"\,",
        "\u202f": r"\,",
        "\u2018": "'",
        "\u2019": "'",
    }
)
SYNONYMS = {
    "dfrac": r"\frac",
    "tfrac": r"\frac",
    "cfrac": r"\frac",
    "le": r"\leq",
    "ge": r"\geq",
    "leqslant": r"\leq",
    "geqslant": r"\geq",
    "ne": r"\neq",
    "lt": "<",
    "gt": ">",
    "rbrace": r"\}",
    "lbrack": "[",
    "rbrack": "]",
    "varnothing": r"\emptyset",
    "degree": r"^\circ",
    "arctg": r"\arctan",
    "tg": r"\tan",
    "ctg": r"\cot",
    "cosec": r"\csc",
    "sen": r"\sin",
    "lg": r"\log",
    "dbinom": r"\binom",
    "tbinom": r"\binom",
    "nicefrac": r"\frac",
    "sfrac": r"\frac",
    "backslash": r"\setminus",
    "smallsetminus": r"\setminus",
    "bmod": r"\bmod",
    "mod": r"\pmod",
    "pounds": "£",
    "euro": "€",
    "texteuro": "€",
    "yen": "¥",
    "colon": ":",
    "lbrace": r"\{",
    "dots": r"\ldots",
    "cdots": r"\ldots",
    "dotsc": r"\ldots",
    "dotsb": r"\ldots",
    "prime": "'",
    "longrightarrow": r"\rightarrow",
    "to": r"\rightarrow",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
    "mid": "|",
    "lor": r"\text{ or }",
    "land": r"\text{ and }",
}
PLAIN = re.compile(r"-?[0-9]+(?:\.[0-9]+)?", re.ASCII)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:\\[,;:! ]|\{,\}|~)+[0-9]{3})+(?![0-9])", re.ASCII)
PLAIN_NAMES = re.compile(r"(?<![\\A-Za-z{])(sqrt|sin|cos|tan|log|ln|pi|infinity)(?![A-Za-z])")
WORDS = re.compile(r"(?<![\\A-Za-z])(?:per ?cents?|percentage|pct|degrees?)(?![A-Za-z])(?!\s*\w)")
WHOLE_TEXT = re.compile(r"\\text\{([^{}]*)\}")


@lru_cache(maxsize=4096)
def canonical(piece: str) -> str:
    """The piece in canonical form.

    Raises:
        Unreadable: too long, too deep, unbalanced, or with control characters.
    """
    _check(piece)
    if PLAIN.fullmatch(piece):  # most answers
        return piece
    text = (piece if piece.isascii() else markup.scripts(piece).translate(UNICODE)).strip()
    text = re.sub(r"\\!\s*", "", text)
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", lambda _: "\\", text)  # escaped once too often
    text = markup.without_delimiters(text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])\s*\.?|\\[bB]igg?[lrm]?(?![A-Za-z])", "", text)
    text = with_bases(markup.matrices(markup.prefixed(markup.plain(text))))
    text = re.sub(r"\\([A-Za-z]+)(\s?)", _synonym, text)
    text = text.replace("<=", r"\leq ").replace(">=", r"\geq ").replace("!=", r"\neq ")
    text = GROUPED.sub(lambda match: re.sub(r"[^0-9]", "", match[0]), text)
    text = text.replace("{,}", ",").replace("{:}", ":")
    text = re.sub(r"(?<!\\)\\[,;:> ]|~", " ", text)
    text = re.sub(r"\\mu\s*\\text\{\s*([mgs])\s*\}", r"\\text{u\1}", text)
    text = re.sub(r"\\text\{\s*(per ?cents?|percentage|pct|degrees?)\s*\}", r" \1 ", text)
    text = WORDS.sub(lambda match: r"\%" if match[0][0] == "p" else r"\degree ", text)
    text = re.sub(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})", lambda _: r"\degree ", text)
    text = re.sub(r"(?<=')\s+(?=')", "", text)
    text = re.sub(r"\^\s*(?:\{\s*('+)\s*\}|('+))", lambda match: match[1] or match[2], text)
    text = re.sub(r"(?<!\\)%", lambda _: r"\%", text)
    text = PLAIN_NAMES.sub(lambda match: "\\" + ("infty" if match[1] == "infinity" else match[1]), text)
    text = re.sub(r"\\sqrt\s*([0-9]+|[a-z])(?![0-9A-Za-z(])", r"\\sqrt{\1}", text) if "\u221a" in piece else text
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\s+", " ", text).strip()
    whole = WHOLE_TEXT.fullmatch(text)
    text = whole[1].strip() if whole else text
    text = re.sub(r"(?:\.|\\)+$", "", text).strip()  # a full stop, or a "\ " whose blank was stripped
    if not text:
        raise Unreadable("the answer is empty")
    return text


@lru_cache(maxsize=4096)
def as_written(text: str) -> str:
    """Canonical text for comparison letter by letter: without blanks that mean nothing, and without markup of words."""
    if text.isalnum():
        return text
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"([\^_])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<=[^0-9A-Za-z]) | (?=[^0-9A-Za-z])", "", text)


def _check(piece: str) -> None:
    if len(piece) > MAX_LENGTH:
        raise Unreadable(f"an answer of {len(piece)} characters, more than {MAX_LENGTH}")
    if CONTROL.search(piece):
        raise Unreadable("a control character")
    depth = braces = 0
    for token in re.findall(r"\\.|[{}()\[\]]", piece, re.DOTALL):
        if token in "([{" or token == r"\{":
            depth += 1
        elif token in ")]}" or token == r"\}":
            depth -= 1
        braces += (token == "{") - (token == "}")
        if depth > MAX_DEPTH:
            raise Unreadable(f"brackets nested more than {MAX_DEPTH} deep")
        if braces < 0:
            break
    if braces:
        raise Unreadable("braces that do not match")


def _synonym(match: re.Match[str]) -> str:
    replacement = SYNONYMS.get(match[1])
    if replacement is None:
        return match[0]
    return replacement + (" " if replacement[-1:].isalpha() or match[2] else "")
