"""Numbers as they are written: integers, decimals, fractions, mixed and repeating ones, and numerals to a base."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+", re.ASCII)
REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{?([0-9]+)\}?", re.ASCII)
SCIENTIFIC = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})", re.ASCII)
FRACTION = re.compile(
    r"(?P<sign>[+-]?) ?(?P<whole>[0-9]+(?= ))? ?(?P<top>[0-9]+) ?/ ?(?P<bottom>[0-9]+)"
    r"|(?P<sign_>[+-]?) ?(?P<whole_>[0-9]+)? ?\\frac ?\{(?P<top_>[0-9]+)\} ?\{(?P<bottom_>[0-9]+)\}",
    re.ASCII,
)
NUMERAL = re.compile(  # FF_{16} is one; AB_2 is a product of two names
    r"(?:([0-9][0-9A-Z]*)\s*_\s*(?:\{\s*([0-9]{1,2})\s*\}|([0-9]))"
    r"|((?=[A-Z]*[0-9])[A-Z][0-9A-Z]*|[A-F]{2,})\s*_\s*\{\s*(1[1-9]|[23][0-9])\s*\})",
    re.ASCII,
)
BASES = {
    name: str(i)
    for i, name in enumerate(
        [
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
        ],
        start=2,
    )
}
_NAMES = "|".join(BASES)
BASE_IN_WORDS = re.compile(
    rf"(?P<digits>[0-9A-Fa-f]+)\s*(?:_\s*\{{?\s*\\text\{{\s*(?:base[ -]?)?\s*(?P<a>{_NAMES}|[0-9]{{1,2}})\s*\}}\s*\}}?"
    rf"|_\s*\{{\s*\\text\{{\s*base[ -]?\s*\}}\s*(?P<f>[0-9]{{1,2}})\s*\}}"
    rf"|_\s*\{{\s*(?P<b>{_NAMES}|\([0-9]{{1,2}}\))\s*\}}"
    rf"|\\text\{{\s*\(?\s*(?:in )?base[ -]?\s*(?P<c>{_NAMES}|[0-9]{{1,2}})\s*\)?\s*\}}"
    rf"|\\text\{{\s*\(?\s*(?:in )?base\s*\}}\s*(?P<d>[0-9]{{1,2}})"
    rf"|\s\(?(?:in )?base\s+(?P<e>{_NAMES}|[0-9]{{1,2}})\)?$)"
)
BRACKETED_NUMERAL = re.compile(r"(?<![A-Za-z0-9])\(\s*([0-9][0-9A-Fa-f]*)\s*\)\s*(?=_)")
NUMERAL_AS_TEXT = re.compile(r"\\text\{\s*([0-9A-Fa-f]+)\s*\}\s*(?=_)")


def with_bases(text: str) -> str:
    r"""Numerals to a base in one form: ``1011_\text{two}``, ``(1011)_2``, ``1011 \text{ (base 2)}``."""
    if "_" not in text and "base" not in text:
        return text
    text = BRACKETED_NUMERAL.sub(r"\1", NUMERAL_AS_TEXT.sub(r"\1", text))
    text = BASE_IN_WORDS.sub(_in_digits, text)
    return re.sub(
        r"(?<![A-Za-z\\0-9_{])[0-9][0-9a-f]*(?=\s*_\s*\{\s*1[0-9]\s*\})", lambda numeral: numeral[0].upper(), text
    )


def _in_digits(match: re.Match[str]) -> str:
    base = next(group for name, group in match.groupdict().items() if name != "digits" and group).strip("()")
    return f"{match['digits'].upper()}_{{{BASES.get(base, base)}}}"


def plain_number(text: str) -> Fraction | None:
    """An integer, decimal, simple fraction, mixed number or one in scientific notation; None for all else."""
    sign, digits = (-1, text[1:].lstrip(" ")) if text.startswith("-") else (1, text.removeprefix("+"))
    if NUMBER.fullmatch(digits):
        return sign * Fraction(digits.replace(",", ""))
    if match := SCIENTIFIC.fullmatch(text):
        return Fraction(match[1]) * Fraction(10) ** int(match[2])
    if match := REPEATING.fullmatch(digits):
        return sign * repeating(match)
    if match := FRACTION.fullmatch(text):
        groups = {name.rstrip("_"): group for name, group in match.groupdict().items() if group is not None}
        top, bottom, whole = int(groups["top"]), int(groups["bottom"]), groups.get("whole")
        if bottom and (whole is None or top < bottom):
            magnitude = int(whole or 0) + Fraction(top, bottom)
            return -magnitude if groups["sign"] == "-" else magnitude
    return None


def repeating(match: re.Match[str]) -> Fraction:
    before, fixed, period = match[1] or "0", match[2], match[3]
    return Fraction(before + "." + (fixed or "0")) + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
