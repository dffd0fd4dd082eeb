r"""What may stand after (or before) a number without being part of it: units, currencies, degrees, percent signs.

A unit may be left out or added, never exchanged for another one. A percent sign is not a unit: it divides by 100.
A bare letter is a unit only beside a pure number ("5 m"), never in a formula ("10-4 m", "t^2 + 6 t").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.math.guard import FUNCTIONS
from rewards.math.text import PLAIN
from rewards.math.words import ATTACHED, CURRENCIES, FILLERS, UNITS, changes_a_number, foreign_unit, names_things

LETTERS = frozenset("mgshLNJWV")  # single letters that are units without \text
_NAME = r"[A-Za-z]+"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?[1-4]\s*\}|[1-4]))?"
TEXTS = re.compile(  # \text{m}, \text{ km}/\text{h}, \text{m} \text{s}^{-2}
    rf"\s*\\text\{{(?:[^{{}}]*)\}}{_POWER}(?:\s*(?:/|\\cdot(?![A-Za-z]))?\s*\\text\{{[^{{}}]*\}}{_POWER})*$"
)
WORDS = re.compile(
    rf"\s+(?P<words>{_NAME}{_POWER}(?:\s*/\s*{_NAME}{_POWER}|\s+{_NAME}){{0,4}})$"
    rf"|(?<=[0-9)}}])(?P<attached>(?:{ATTACHED}){_POWER})$",
    re.ASCII,
)
_UNITS = r"\{\s*(\\text\{[^{}]*\}(?:\s*(?:\\cdot|\^\s*[1-4])?\s*\\text\{[^{}]*\})*(?:\s*\^\s*\{?[1-4]\}?)?)\s*\}"
FRACTION_OF_UNITS = re.compile(rf"\\frac\s*{_UNITS}\s*{_UNITS}$")
FACTOR = re.compile(r"([A-Za-z$€£¥₹]+)(?:\s*\^?\s*\{?\s*(-?[1-4])\s*\}?)?")
MARK = re.compile(
    r"\s*(?:\\(?P<percent>%)|\\(?P<degree>degree)(?![A-Za-z]))\s*(?:\\text\{\s*)?(?P<scale>[CF])?(?:\s*\})?$"
)
CURRENCY = r"\\\$|[€£¥₹₩₽]"
MONEY = re.compile(
    rf"(?P<sign>-?)\s*(?:(?:US|AU|NZ|HK|A|C)?\s*(?P<mark>{CURRENCY})"
    r"|(?P<code>Rs\.?|USD|EUR|GBP|INR|JPY|CNY|RMB|CHF)(?=[ 0-9]))"
    r"\s*(?P<rest>-?[0-9.\\].*)$",
    re.DOTALL,
)
MONEY_AFTER = re.compile(rf"(?<=[0-9)}}])\s*(?P<mark>{CURRENCY}|¢)$")
FOREIGN = re.compile(r"(?<=[0-9)}])\s*([^\x00-\x7f]+\.?)$")
NUMERIC_COMMANDS = re.compile(r"\\(?:frac|sqrt|pi|cdot|times|div|overline)(?![A-Za-z])")
SHAPE = re.compile(
    r"\s+(?:long|wide|tall|high|deep|thick|old|away|apart|later|ago|in (?:length|width|height|area|diameter))$"
)


@dataclass(frozen=True)
class Quantity:
    """A value's text, and what stands beside it: ``unit`` canonical, ``mark`` is "%" or "degree" or "".

    ``product`` is the whole text where the unit is a bare letter, which may as well be a factor.
    """

    value: str
    unit: str = ""
    mark: str = ""
    product: str = ""


def split(text: str) -> Quantity:
    """A canonical formula without its unit, percent sign or degree sign."""
    if PLAIN.fullmatch(text):
        return Quantity(text)
    text, money = _without_money(text)
    if match := MARK.search(text):
        return _marked(text, match, money)
    if match := FOREIGN.search(text):
        unit = foreign_unit(match[1])
        value = text[: match.start()].strip()
        if unit == "degree":
            return Quantity(value, mark="degree")
        return Quantity(value, unit) if unit else Quantity(text, money)
    text = FRACTION_OF_UNITS.sub(_in_one_line, text)
    if match := TEXTS.search(text):
        unit, value = unit_of(_plain(match[0])), text[: match.start()].strip()
        if unit and value:
            return Quantity(value, money or unit)
    elif match := WORDS.search(text):
        value = text[: match.start()].strip()
        found = match["words"] or match["attached"]
        unit = _bare_unit(found, value)
        if unit and value and (value[-1] in "0123456789)}" or value.endswith(r"\pi")):
            single = len(found) == 1
            return Quantity(value, money or unit, product=text if single else "")
    return Quantity(text, money)


def _in_one_line(match: re.Match[str]) -> str:
    """A fraction of units: ``J/(mol K)`` as ``J/mol/K``."""
    below = re.sub(r"\s*\\cdot\s*|(?<=\})\s*(?=\\text)", "/", match[2])
    return f"{match[1]}/{below}"


def _without_money(text: str) -> tuple[str, str]:
    if match := MONEY.match(text):
        mark = (match["mark"] or match["code"]).replace("\\", "").rstrip(".")
        return match["sign"] + match["rest"], UNITS.get(mark, mark)
    if match := MONEY_AFTER.search(text):
        mark = match["mark"].replace("\\", "").replace("¢", "cent")
        return text[: match.start()], UNITS.get(mark, mark)
    return text, ""


def _marked(text: str, match: re.Match[str], money: str) -> Quantity:
    """A percent or degree sign belongs to one term: that of ``5+3\\%`` and of ``\\sin 20^\\circ`` is in the formula."""
    value = text[: match.start()].strip()
    functions = FUNCTIONS & set(re.findall(r"\\([A-Za-z]+)", value))
    if not value or is_sum(value) or functions or r"\degree" in value or r"\%" in value:
        return Quantity(text, money)
    if match["scale"]:
        return Quantity(value, match["scale"])
    return Quantity(value, money, "%" if match["percent"] else "degree")


def is_sum(text: str) -> bool:
    """Whether a plus or minus stands outside of all brackets, other than as the sign of it all."""
    depth = 0
    before = ""
    for symbol in text:
        depth += (symbol in "([{") - (symbol in ")]}")
        if depth == 0 and symbol in "+-" and before not in ("", "^", "*", "/", "e", "E"):
            return True
        if symbol != " ":
            before = symbol
    return False


def is_pure_number(text: str) -> bool:
    """Whether a formula is one term without variables: ``5``, ``3\\sqrt{2}``, ``1.2 \\cdot 10^{3}``."""
    return not is_sum(text) and not re.search(r"[A-Za-z\\]", NUMERIC_COMMANDS.sub(" ", text))


def compatible(a: str, b: str) -> bool:
    """Whether two units may be the same: one is left out, they are equal, or both are things counted (many names)."""
    if {a, b} in ({"pound", "lb"}, {"pound", "£"}):
        return True  # the word is of money, and of weight
    return not a or not b or a == b or not (_known(a) or _known(b))


def _known(unit: str) -> bool:
    return all(word.rstrip("-1234") in _CANONICAL for word in unit.split("*"))


_CANONICAL = frozenset(UNITS.values())


def _plain(texts: str) -> str:
    """``\\text{ km}/\\text{h}`` as ``km/h``."""
    return re.sub(r"\\text\{([^{}]*)\}", r" \1 ", texts).replace(r"\cdot", " ").strip(" .")


def _bare_unit(found: str, value: str) -> str:
    """The unit of words without ``\\text``, which may as well be variables."""
    words = re.findall(_NAME, SHAPE.sub("", " " + found))
    short = [word for word in words if len(word) < 4 and word not in FILLERS]
    if any(word not in UNITS for word in short if not names_things(found)):
        return ""
    if any(len(word) < 3 and word not in UNITS for word in short):
        return ""
    if any(len(word) == 1 and word not in LETTERS for word in words):
        return ""
    if any(len(word) < 3 for word in short) and not is_pure_number(value):
        return ""
    return unit_of(found)


def unit_of(found: str) -> str:
    """The canonical unit of words such as ``km/h``, ``square feet`` or ``red apples``; "" where they are none."""
    found = SHAPE.sub("", " " + found.strip()).strip()
    words = re.findall(_NAME, found)
    if any(map(changes_a_number, (word for word in words if word != "in" or len(words) > 1))) and not names_things(
        found
    ):
        return ""
    if not FUNCTIONS.isdisjoint(words) or re.search(r"[0-9]", re.sub(r"\^?\s*\{?\s*-?[1-4]\s*\}?", "", found)):
        return ""
    if paid := _currency(found):
        return paid
    if known := _dimensions(found):
        return known
    head, _, rest = found.partition(" of ")
    if rest and not any(map(changes_a_number, re.findall(_NAME, rest))):
        return unit_of(head)
    parts = re.split(r"\s*/\s*|\s+per\s+", re.sub(r"^per\s", "things per ", found))
    if re.fullmatch(r"[A-Za-z .,'/-]+", found) and all(names_things(part) or _dimensions(part) for part in parts):
        return found.lower()
    return ""


def _currency(found: str) -> str:
    """The currency of ``dollars per person`` and of ``dollars``; "" for all else."""
    head, *what = re.split(r"\s*/\s*|\s+per\s+|\s+each$|\s+a\s+", found)
    name = UNITS.get(head, "")
    return name if name in CURRENCIES and all(not w or names_things(w) or _dimensions(w) for w in what) else ""


def _dimensions(found: str) -> str:
    """Known units with their powers, in alphabetical order: ``m*s-2``; "" where a word is no known unit."""
    powers: dict[str, int] = {}
    sign, times = 1, 1
    for match in re.finditer(r"/|" + FACTOR.pattern, found):
        word = match[1]
        if word is None or word == "per":
            sign = -1
        elif word in ("square", "sq"):
            times = 2
        elif word in ("cubic", "cu"):
            times = 3
        elif word in ("squared", "cubed"):
            if not powers:
                return ""  # "42 squared"
            last = next(reversed(powers))
            powers[last] *= 2 if word == "squared" else 3
        elif word in UNITS:
            for side, name in zip((1, -1), UNITS[word].split("/"), strict=False):  # mph is mi/h
                powers[name] = powers.get(name, 0) + side * sign * times * int(match[2] or 1)
            times = 1
        elif word not in FILLERS:
            return ""
    if not powers or times != 1:
        return ""
    return "*".join(name + ("" if power == 1 else str(power)) for name, power in sorted(powers.items()) if power)
