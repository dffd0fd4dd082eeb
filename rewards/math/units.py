r"""What may stand after (or before) a number without being part of it: units, currencies, degrees, percent signs.

A unit may be left out or added, never exchanged for another one. A percent sign is not a unit: it divides by 100.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.math.extract import NOT_BESIDE
from rewards.math.guard import FUNCTIONS

# Names of one unit, the first of which is used. A plural "s" is understood.
_SYNONYMS = """
mm millimeter millimetre|cm centimeter centimetre|dm decimeter decimetre|m meter metre|km kilometer kilometre|
in inch inches|ft foot feet|yd yard|mi mile|mg milligram|g gram gm|kg kilogram kilo|t ton tonne|lb pound lbs|oz ounce|
ml milliliter millilitre mL|l liter litre L|gal gallon|s sec second|min minute|h hr hour|day|week|month|yr year|
mi/h mph|km/h kmh kph|Hz hertz|N newton|J joule|W watt|V volt|A ampere amp|ohm|K kelvin|
$ dollar USD|cent|euro EUR €|£ GBP|rupee Rs|yen|rad radian|unit|C Celsius celsius|F Fahrenheit fahrenheit
"""
UNITS = {
    spelling: names.split()[0]
    for names in _SYNONYMS.replace("\n", "").split("|")
    for name in names.split()
    for spelling in (name, name + "s")
}
ATTACHED = "mm|cm|km|kg|mg|mL|ml|ft|lbs?|mph|min|Hz"  # may follow a number without a blank: "42cm"
FILLERS = frozenset({"square", "sq", "squared", "cubic", "cu", "cubed", "per", "of", "the", "a"})
_NAME = r"[A-Za-z]+"
UNIT = re.compile(
    r"(?:\s*\\text\{\s*(?P<text>[A-Za-z][A-Za-z .,/^0-9-]*?)\.?\s*\}"
    rf"|\s+(?P<words>{_NAME}(?:\s*/\s*{_NAME}|\s+{_NAME}){{0,3}})"
    rf"|(?P<attached>{ATTACHED}))"
    r"\s*(?:\^\s*\{?\s*(?P<power>[23])\s*\}?)?$",
    re.ASCII,
)
SUFFIX = re.compile(r"\s*(?:\\(?P<percent>%)|\\(?P<degree>degree))\s*(?:\\text\{\s*)?(?P<scale>[CF])?(?:\s*\})?$")
MONEY = re.compile(r"(?P<sign>-?)\s*(?:\\\$|(?P<other>[€£]))\s*(?P<rest>-?[0-9.\\].*)$", re.DOTALL)


@dataclass(frozen=True)
class Quantity:
    """A value's text, and what stands beside it: ``unit`` canonical, ``mark`` is "%" or "degree" or ""."""

    value: str
    unit: str = ""
    mark: str = ""


def split(text: str) -> Quantity:
    """A canonical formula without its unit, percent sign or degree sign."""
    unit = ""
    if match := MONEY.match(text):
        text, unit = match["sign"] + match["rest"], match["other"] or "$"
        unit = UNITS.get(unit, unit)
    if match := SUFFIX.search(text):
        if not text[: match.start()].strip():
            return Quantity(text)
        value = text[: match.start()].strip()
        if match["scale"]:
            return Quantity(value, match["scale"])
        return Quantity(value, unit, "%" if match["percent"] else "degree")
    match = UNIT.search(text)
    if match and (found := _unit(match)):
        value = text[: match.start()].strip()
        if value and (match["text"] or value[-1] in "0123456789)}"):
            return Quantity(value, unit if found == UNITS["dollar"] and unit else found)
    return Quantity(text, unit)


def compatible(a: str, b: str) -> bool:
    """Whether two units may be the same: one is left out, they are equal, or both are things counted (many names)."""
    return not a or not b or a == b or not (_known(a) or _known(b))


def _known(unit: str) -> bool:
    return all(word.rstrip("23") in UNITS for word in unit.split("/"))


def _unit(match: re.Match[str]) -> str:
    """The canonical unit; "" where it is something else."""
    found = match["text"] or match["words"] or match["attached"]
    words = re.findall(r"[A-Za-z]+", found)
    if not NOT_BESIDE.isdisjoint(word.lower() for word in words) or not FUNCTIONS.isdisjoint(words):
        return ""
    if match["text"] is None and any(len(word) < 4 and word not in UNITS and word not in FILLERS for word in words):
        return ""  # more likely variables
    if any(len(word) < 3 and word not in UNITS and word not in FILLERS for word in words):
        return ""  # "42 k", "42 M"
    if match["text"] is not None and re.search(r"[0-9]", re.sub(r"\^?[23]\b", "", found)):
        return ""
    squared = {"square", "sq", "squared"} & set(words) or match["power"] == "2" or re.search(r"\^?2\b", found)
    cubed = {"cubic", "cu", "cubed"} & set(words) or match["power"] == "3" or re.search(r"\^?3\b", found)
    parts = re.split(r"\s*/\s*|\s+per\s+", found)
    names = [
        " ".join(UNITS.get(word, word.lower()) for word in re.findall(r"[A-Za-z]+", part) if word not in FILLERS)
        for part in parts
    ]
    if not all(names):
        return ""  # "42 squared"
    return "/".join(names) + ("2" if squared else "3" if cubed else "")
