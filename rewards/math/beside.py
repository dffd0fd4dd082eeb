r"""What stands beside a box: whether the box is a whole answer, or a part of a larger formula or of a denial.

``$x = \boxed{42}$`` is 42. ``$-\boxed{42}$``, ``\boxed{42}^2``, ``\boxed{42}!`` and "not \boxed{42}" are not, and no
reading of them is: such an answer is refused. Percent signs, degrees, units and bases that follow belong to the answer.
"""

from __future__ import annotations

import re

from rewards.math.units import unit_of
from rewards.math.words import changes_a_number
from rewards.tags import NoAnswer

REACH = 400  # characters on either side that are looked at
SPACE = r"(?:\\[,;:!> ]|\\q?quad(?![A-Za-z])|\\displaystyle(?![A-Za-z])|~|[ \t\n])"
SPACE_AT_END = re.compile(r"\\(?:[,;:!> ]|q?quad|displaystyle)$")
SPACES_AFTER = re.compile(rf"{SPACE}+")
DOLLARS = re.compile(r"(?<!\\)\$+")
STYLE = re.compile(
    r"(?:\\(?:mathbf|boldsymbol|bm|mathit|mathrm|mathsf|underline|textbf|text|emph|ensuremath|large|Large|huge|bf)"
    r"|\\(?:text)?color\s*\{[^{}]*\})?\s*\{$"
)
PLAIN_STYLE = re.compile(
    r"\\(?:large|Large|LARGE|huge|Huge|bf|rm|normalsize|color\s*\{[^{}]*\}|left|right|[bB]igg?[lrm]?)$"
)
INSIDE_TEXT = re.compile(r"\\(?:text[a-z]*|mathbf|boldsymbol|emph|underline)\s*\{[^{}]*$")
TEXT_BEFORE = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}$")
TEXT_AFTER = re.compile(
    r"(?P<text>\\(?:text|textbf|textrm|mathrm|mbox)\s*\{(?P<words>[^{}]*)\}(?:\s*\^\s*\{?-?[1-4]\}?)?"
    r"(?:\s*/\s*\\(?:text|mathrm)\s*\{[^{}]*\}(?:\s*\^\s*\{?-?[1-4]\}?)?)?)"
)
ENDS_A_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{.*\}$", re.DOTALL)
ENDS_AN_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[^{}]*\}(?:\{[^{}]*\})?$")
LEADS_TO = re.compile(  # commands before a box that say "so", "equals" or nothing
    r"\\(?:Rightarrow|Longrightarrow|rightarrow|longrightarrow|implies|iff|Leftrightarrow|therefore|because|to|approx|"
    r"equiv|in|colon|quad|qquad|hfill|\\|cong|simeq|doteq|hline|noindent|centering|newline|triangleq|quad)$"
)
GOES_ON = re.compile(  # and those after one
    r"\\(?:Rightarrow|Longrightarrow|rightarrow|implies|iff|quad|qquad|tag|blacksquare|square|Box|qed|checkmark|hfill|"
    r"end|approx|in|\\|pmod|therefore|label|newline|notag|nonumber|right)(?![A-Za-z])|\\\\"
)
_JOINING = "and but if so because since with to from by for into is are be therefore thus hence"
JOINING = frozenset(_JOINING.split())  # words that may follow a number in a sentence, but not in a unit
MULTIPLIES = frozenset("万萬亿億千百十半倍分成折多余餘만억천백")  # directly after a number
BELONGS = re.compile(  # what follows a box and belongs to its number
    r"\\?%|\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))(?:\s*(?:\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|[CF](?![A-Za-z])))?|"
    r"°[CF]?|_\s*(?:\{[^{}]*\}|[0-9]|\\text\s*\{[^{}]*\})"
)
DENIED_BEFORE = re.compile(
    r"\b(?:not|never|neither|nor|either|isn't|aren't|wasn't|cannot be|can't be|n't|negative|minus|plus|times|twice"
    r"|thrice|double|triple|half|quarter|third)(?:\s+(?:be|of|the|equal to|a|an|exactly|simply|just))*$"
    r"|\b(?:less|more|greater|smaller|larger|fewer|other|rather|bigger|higher|lower) than(?:\s+the)?$"
    r"|\b(?:root|square|cube|power|multiple|factorial|inverse|reciprocal|negative|opposite|logarithm|fraction) of$"
    r"|(?:不|不是|并非|不等于)$"
    r"|\b(?:any ?thing|everything|all|nothing) but$"
    r"|\b(?:instead of|except|unless|without|divided by|multiplied by|to the power(?: of)?)$",
    re.IGNORECASE,
)
DENIED_AFTER = re.compile(
    r"\s*(?:(?:is|was|would be|seems|looks|cannot be|can't be|isn't|wasn't|will)\s+(?:not|n't|never|wrong|incorrect|"
    r"false|impossible|invalid)\b|isn't\b|cannot be\b|can't be\b|(?:is|are)\s+(?:squared|cubed|doubled|halved)|or\b|"
    r"squared\b|cubed\b|factorial\b|minus\b|plus\b|percent|per cent|times\s+(?:\$|\\|[0-9]|the\b|two|three|ten|as\b)|"
    r"divided by\b|multiplied by\b|to the power\b|modulo\b|mod\b|choose\b|doubled\b|tripled\b|halved\b|negated\b)",
    re.IGNORECASE,
)


def whole(text: str, start: int, end: int) -> str:
    """What follows the box ``text[start:end]`` and belongs to its number ("%", a unit), usually "".

    Raises:
        NoAnswer: the box is no answer of its own.
    """
    before, after = text[max(0, start - REACH) : start], text[end : end + REACH]
    in_formula = _in_formula(text, start)
    suffix, after = _belonging(after, in_formula)
    for _ in range(8):  # out of style groups and brackets that hold the box alone
        left = _without_spaces(before)
        if left[-1:] not in ("{", "(") and "\\" not in left[-16:]:
            break
        right = after[spaces.end() :] if (spaces := SPACES_AFTER.match(after)) else after
        if left.endswith("("):
            left, right = re.sub(r"\\left\s*\($", "(", left), re.sub(r"^\\right\s*\)", ")", right)
        if (style := STYLE.search(left)) and right.startswith("}"):
            before, after = left[: style.start()], right[1:]
        elif in_formula and left.endswith("(") and right.startswith(")"):
            before, after = left[:-1], right[1:]
        elif style := PLAIN_STYLE.search(left):
            before = left[: style.start()]
        else:
            break
    if after.lstrip().startswith("}") and INSIDE_TEXT.search(before):
        after = after.partition("}")[2]
    _check_before(before, in_formula)
    _check_after(after, in_formula)
    return suffix


def _without_spaces(before: str) -> str:
    """Text without the blanks and TeX spaces at its end."""
    while True:
        before = before.rstrip(" \t\n~")
        space = SPACE_AT_END.search(before[-14:]) if "\\" in before[-14:] else None
        if not space:
            return before
        before = before[: len(before) - len(space[0])]


def _in_formula(text: str, start: int) -> bool:
    """Whether the box stands between dollars, as far as its paragraph says (money is written with them, too)."""
    begin = text.rfind("\n\n", max(0, start - 4000), start) + 2 if "\n\n" in text[max(0, start - 4000) : start] else 0
    begin = max(begin, start - 4000)
    finish = text.find("\n\n", start, start + 4000)
    paragraph_before = text[begin:start]
    paragraph_after = text[start : finish if finish >= 0 else start + 4000]
    dollars = len(DOLLARS.findall(paragraph_before)), len(DOLLARS.findall(paragraph_after))
    return sum(dollars) % 2 == 0 and dollars[0] % 2 == 1


def _belonging(after: str, in_formula: bool) -> tuple[str, str]:
    """The suffix of the number, and what follows it."""
    spaces = SPACES_AFTER.match(after)
    rest = after[spaces.end() :] if spaces else after
    if (in_formula or not spaces) and (match := BELONGS.match(rest)):
        return match[0].replace("%", r"\%").replace(r"\\%", r"\%"), rest[match.end() :]
    if match := TEXT_AFTER.match(rest):
        words = re.sub(r"\\(?:text[a-z]*|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", match["text"]).replace("~", " ")
        if unit_of(words.strip(" .")):
            return " " + match["text"].replace(".", ""), rest[match.end() :]
        first = re.findall(r"[A-Za-z]+", match["words"])
        if (first and changes_a_number(first[0]) and first[0] not in JOINING) or DENIED_AFTER.match(match["words"]):
            raise NoAnswer("the words after the box make it another number")
        return "", rest[match.end() :]
    return "", after


def _check_before(before: str, in_formula: bool) -> None:
    """Raises NoAnswer if what stands directly before the box makes more of it."""
    rest = _without_spaces(before)
    spaced = len(rest) < len(before)
    if rest.endswith("$") and not rest.endswith("\\$"):
        _check_crossed_before(rest.rstrip("$"), in_formula)
        return
    if rest.endswith(("\\$", "€", "£", "¥")):
        _check_before(rest[:-1].removesuffix("\\"), in_formula)
        return
    if words := TEXT_BEFORE.search(rest) if rest.endswith("}") else None:
        _check_words_before(words[1])
        return
    if in_formula and _open_brackets(rest):
        raise NoAnswer("the box is inside of brackets")
    last = rest[-1:]
    if not last or LEADS_TO.search(rest) or rest.endswith("\\\\"):
        return
    if re.search(r"\\[A-Za-z]+$", rest):
        raise NoAnswer("the box is part of a larger formula")
    if last.isalpha() or last == "'":
        word = re.search(r"[A-Za-z']+$", rest)
        if word and (not spaced or (in_formula and len(word[0]) == 1)) and (in_formula or len(word[0]) == 1):
            raise NoAnswer("the box is part of a larger formula")
        _check_words_before(rest)
        return
    _check_symbol_before(rest, spaced, in_formula)


def _check_symbol_before(rest: str, spaced: bool, in_formula: bool) -> None:
    last = rest[-1]
    if not spaced and re.search(r"[0-9][.,]$", rest):
        raise NoAnswer("the box is part of a number")
    if last == "=":
        if rest[-2:] in ("!=", "<=", ">="):
            raise NoAnswer("the box is part of an inequality")
        return
    if last in "<>":
        if last == ">" and (re.search(r"<[^<>]*>$|(?:^|\n)[ >]*>$|=>$|->$", rest)):
            return  # a tag, a quotation, an arrow
        raise NoAnswer("the box is part of an inequality")
    if last in "-\u2212\u2013\u00ac":
        if in_formula or not spaced or last == "\u00ac":
            raise NoAnswer("a minus before the box")
        return  # a dash
    if last == "*" and not in_formula and not re.search(r"[0-9A-Za-z)}]\s*\*$", rest):
        return  # markup
    if last in "_" and not in_formula and not re.search(r"[0-9A-Za-z)}]_$", rest):
        return
    if last in "+*/^_!|{\u00d7\u00f7\u00b7\u00b1":
        raise NoAnswer("the box is part of a larger formula")
    if last in "([" and in_formula:
        raise NoAnswer("the box is inside of brackets")
    if last in "0123456789)]}" and (in_formula or not spaced):
        if ENDS_A_BOX.search(rest[-200:]) or ENDS_AN_ENVIRONMENT.search(rest):
            return
        raise NoAnswer("the box is part of a larger formula")


def _check_crossed_before(rest: str, in_formula: bool) -> None:
    """What stands before the dollar before the box: words, a minus, or a formula that ends open."""
    stripped = rest.rstrip(" \t\n")
    if not in_formula and re.search(r"(?:[-+*/^]|\\(?:cdot|times|div|pm|neq?|leq?|geq?))$", stripped[-8:]):
        raise NoAnswer("the formula before the box goes on in it")
    if stripped[-1:] in ("-", "\u2212") and len(stripped) == len(rest):
        raise NoAnswer("a minus before the box")
    _check_words_before(stripped)


def _check_words_before(words: str) -> None:
    line = re.sub(r"\*+", "", words.rpartition("\n")[2] or words.strip()).rstrip(" ")
    if DENIED_BEFORE.search(line[-60:]):
        raise NoAnswer("the words before the box deny it or make it another number")


def _open_brackets(rest: str) -> bool:
    """Whether a bracket is open where the formula that holds the box reaches it."""
    formula = re.split(r"(?<!\\)\$+", rest)[-1]
    formula = re.sub(r"\\(?:text|mathrm)\s*\{[^{}]*\}", "", formula)
    depth = 0
    for symbol in reversed(formula):
        depth += (symbol in ")]") - (symbol in "([")
        if depth < 0:
            return True
    return False


def _check_after(after: str, in_formula: bool) -> None:
    """Raises NoAnswer if what stands directly after the box makes more of it."""
    spaces = SPACES_AFTER.match(after)
    rest = after[spaces.end() :] if spaces else after
    if dollars := re.match(r"\$+", rest):
        crossed = rest[dollars.end() :]
        if not in_formula and re.match(r"\s*(?:[-+*/^]|\\(?:cdot|times|div|pm))", crossed):
            raise NoAnswer("the formula after the box begins in it")
        if re.match(r"[-+*/^]\s*[0-9$\\(A-Za-z]|\s*(?:\\?%)", crossed) or DENIED_AFTER.match(crossed):
            raise NoAnswer("what follows the box makes it another number")
        return
    first = rest[:1]
    if not first or (GOES_ON.match(rest) and not rest.startswith(r"\in ")):
        return
    if first == "\\":
        if re.match(r"\\(?:boxed|fbox|text|textbf|\$|\)|\]|in|mathrm)", rest):
            return
        raise NoAnswer("the box is part of a larger formula")
    if DENIED_AFTER.match(rest):
        raise NoAnswer("the words after the box deny it or make it another number")
    if first in MULTIPLIES:
        raise NoAnswer("what follows the box makes it another number")
    if first.isalpha():
        word = re.match(r"[A-Za-z]+", rest)
        if word and ((not spaces) or (in_formula and len(word[0]) == 1)):
            raise NoAnswer("the box is part of a larger formula")
        return
    _check_symbol_after(rest, bool(spaces), in_formula)


def _check_symbol_after(rest: str, spaced: bool, in_formula: bool) -> None:
    first = rest[0]
    if not spaced and re.match(r"[.,][0-9]", rest):
        raise NoAnswer("the box is part of a number")
    if not in_formula and re.match(r"_+(?:[\s.,;:]|$)", rest):
        return  # markup
    if first == "!" and (in_formula or not spaced):
        raise NoAnswer("a factorial of the box")
    if first in "0123456789([" and (in_formula or not spaced):
        raise NoAnswer("the box is part of a larger formula")
    if first in "-\u2212\u2013" and (in_formula or (re.match(r".\s*[0-9A-Za-z\\(]", rest) and not spaced)):
        raise NoAnswer("the box is part of a larger formula")
    if first == "*" and (in_formula or re.match(r"\*\s*[0-9A-Za-z\\(]", rest)):
        raise NoAnswer("the box is part of a larger formula")
    if first == "<" and not re.match(r"</?[A-Za-z][^<>]*>", rest):
        raise NoAnswer("the box is part of an inequality")
    if first == ">" or (first == "|" and (in_formula or not spaced)):
        raise NoAnswer("the box is part of a larger formula")
    if first in "+/^_'{}\u00d7\u00f7\u00b7\u00b1\u00b2\u00b3\u221a":
        raise NoAnswer("the box is part of a larger formula")
