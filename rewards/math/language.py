"""Answers in words: "Monday", "no solution", a choice such as "(B)", and notation that is compared as it is written."""

from __future__ import annotations

import re

from rewards.math.expression import DERIVATIVE
from rewards.math.guard import COMMANDS
from rewards.math.text import as_written, canonical
from rewards.math.text_errors import Unreadable

WORD = re.compile(r"[A-Za-z]{3,}")
WORDS = re.compile(r"[A-Za-z0-9 ,.'&:;?!()/-]+")
CHOICE_WITH_TEXT = re.compile(
    r"\s*(?:(?:option|choice|answer)\s*:?\s*)?(?:\(\s*(?P<a>[A-J])\s*\)\s*[.:]?|(?P<b>[A-J])\s*(?:\)|[.:](?=[\s$\\])))"
    r"(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
NAMED_CHOICE = re.compile(r"\s*(?:option|choice|answer)\s*:?\s*\(?([A-J])\)?\.?", re.IGNORECASE)
ANOTHER_CHOICE = re.compile(r"\(\s*[A-J]\s*\)|(?:\b(?:or|and|not|nor)|[,/&])\s*\(?[A-J]\)?(?![A-Za-z])|^\s*[A-J][.):]")
CHOICE = re.compile(r"(\(?)([A-Za-z])[).:]?")
BUILDER = re.compile(r"^\\\{[^|:]+[|:].+\\\}$", re.DOTALL)  # {(x, y) | x + y = 1}
CIRCLED = re.compile(r"[\u2460-\u2473][\u2460-\u2473, ]*")  # statements by number
MAX_WORDS = 12
SHORT_WORDS = frozenset({"no", "up", "am", "pm", "he", "we", "it", "us"})
TIME = re.compile(r"[0-9]{1,2}:[0-9]{2}( ?[ap]\.? ?m\.?)?", re.IGNORECASE)
RATIO = re.compile(r"[0-9]+(?: ?: ?[0-9]+)+")
# Notation with nothing to compute: compared as it is written, where the gold answer is of this kind.
WRITTEN = re.compile(
    r"\\(?:overline|overrightarrow|angle|triangle|cong|sim|parallel|perp|to|rightarrow|mathbb|mathbf|vec|hat|bar|cap|mathcal|mathfrak|"
    r"sum|int|iint|oint|prod|lim|partial|nabla|notin|forall|exists|oplus|otimes|mapsto|neg|equiv|pmod|bmod|dot|ddot|"
    r"tilde|widehat|operatorname|mathrm|Leftrightarrow|Rightarrow|det|max|min|gcd|lcm|dagger|propto|cdots|"
    r"setminus|subset|subseteq|text|ldots|dots|prime|infty|emptyset|pm|begin|end|cup|circ|star|implies|iff)(?![A-Za-z])"
)


def is_written_only(piece: str) -> bool:
    """Whether a gold answer that cannot be read is notation or language ("10:30 a.m.", "2 dozen"), and not broken."""
    try:
        text = canonical(piece)
    except Unreadable:
        return False
    words = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    if is_prose(words):
        return False
    if TIME.fullmatch(words) or (WORDS.fullmatch(words) and set(WORD.findall(words)) - {"and"}):
        return True
    unknown = {
        name
        for name in re.findall(r"\\([A-Za-z]+)", WRITTEN.sub("", text))
        if name not in COMMANDS | {"degree", "langle", "rangle"}
    }
    return (
        bool(WRITTEN.search(text) or DERIVATIVE.search(text) or BUILDER.search(text))
        and not unknown
        and not re.search(r"[+*/^_=-]\s*$", text)
    )


def choice(text: str) -> tuple[str, str] | None:
    """The letter and the text of ``(B) 12``, ``C: the option's text`` or ``Option B``; None for all else.

    Raises:
        Unreadable: several options.
    """
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    if named := NAMED_CHOICE.fullmatch(plain):
        return named[1].upper(), ""
    match = CHOICE_WITH_TEXT.fullmatch(plain)
    if not match or not match["rest"].strip():
        return None
    letter, rest = match["a"] or match["b"], match["rest"].strip()
    if not letter.isupper() or re.match(
        r"[-+*/^=<>_!,]|\\(?:cdot|times|cup|cap|leq|geq|neq|in|div|pm)(?![A-Za-z])", rest
    ):
        return None
    if not re.match(r"[\s0-9\\$]", match["rest"]):
        return None
    if ANOTHER_CHOICE.search(rest):
        raise Unreadable("more than one option")
    return letter, rest


def letter_of(text: str) -> str:
    """The option that words or a value name: "B" for "(B)" and "b."; "" where they name none."""
    match = CHOICE.fullmatch(as_written(text))
    return match[2].upper() if match else ""


def is_words(text: str) -> bool:
    """Whether a canonical text is language: "Monday", "(B)", "not enough information"."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    if CIRCLED.fullmatch(text):
        return True
    if not WORDS.fullmatch(text) or is_prose(text):
        return False
    choice = CHOICE.fullmatch(text)
    if choice:
        return len(text) > 1
    starts_with_number = re.match(r"[-(]*\.?[0-9]", text)
    if starts_with_number:
        return False
    return bool(WORD.search(text)) or text.lower() in SHORT_WORDS


def is_prose(text: str) -> bool:
    """Whether a text says more than an answer does: several sentences, or one that nobody writes the same again."""
    words = [word for word in WORD.findall(re.sub(r"\\[A-Za-z]+", " ", text)) if word not in ("and", "text")]
    return len(words) > MAX_WORDS or bool(re.search(r"[a-z]{2,}[.?!;] +[A-Z][a-z]*[a-z ]", text))


def same_words(gold: str, answer: str) -> bool:
    """Words are compared without regard to case, a choice without its brackets."""
    gold, answer = as_written(gold), as_written(answer)
    if CIRCLED.fullmatch(gold):
        return sorted(re.sub("[, ]", "", gold)) == sorted(re.sub("[, ]", "", answer))
    if gold == answer:
        return True
    choices = CHOICE.fullmatch(gold), CHOICE.fullmatch(answer)
    if choices[0] and choices[1]:
        return choices[0][2].lower() == choices[1][2].lower()
    if not (WORD.search(gold) or TIME.fullmatch(gold) or gold.lower() in SHORT_WORDS):
        return False  # x and X may be two names
    return gold.casefold() == answer.casefold()
