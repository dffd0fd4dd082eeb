r"""Whether an answer is the gold answer: the same shape, with the same values in it.

    gold                 also right
    a value, ``5``       ``x = 5``; ``AB = 5``, ``f(2) = 5``; with a unit
    ``42 cm``            without the unit, never with another one
    ``42\%``             ``42`` and 0.42; under a gold without a percent sign, ``42\%`` is 0.42 alone
    ``90^\circ``         ``90`` and ``\pi/2``
    ``x = 5``            ``5``, and the same equation in another form
    a list ``1, 2``      in any order, as a set, as ``x = 1, x = 2``
    a point ``(1, 2)``   ``x = 1, y = 2``
    an interval          an inequality of one name, set-builder notation, and the other way round
    ``1011_2``           ``1011``, never 11
    ``3 \pmod 5``        ``8 \pmod 5``, and 3
    ``k\pi, k \in Z``    ``n\pi + \pi, n \in Z``, and without the set
    the option ``B``     ``(B) 12``

A tuple is no set, and no two brackets are the same. docs/rewards.md has the whole table, line by line a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rewards.math import exact, expression, functions, numbers, units
from rewards.math.exact import Exact, NotExact
from rewards.math.families import same_family, same_residue
from rewards.math.guard import check_for_worker
from rewards.math.language import letter_of, same_words
from rewards.math.names import assignments, name_of, named, root_of, without_names
from rewards.math.regions import as_region
from rewards.math.shapes import FLIPPED, Form, ungrouped
from rewards.math.text import as_written
from rewards.math.text_errors import Unreadable

MAX_ITEMS = 64

Same = Callable[[str, str], bool]  # whether two formulas, gold's first, have the same value


def same_value(gold: str, answer: str) -> bool:
    """The exact path's comparison of two formulas.

    Raises:
        NotExact: one of them needs a computer algebra system.
        Unreadable: one of them is no formula.
    """
    if as_written(gold) == as_written(answer):
        return True
    if _infinity(gold) or _infinity(answer):
        return _infinity(gold) == _infinity(answer)
    a, b = _value_or_none(gold), _value_or_none(answer)  # both are read: an answer that is no formula raises
    same = functions.same(a, b) if a is not None and b is not None else None
    if same is None:
        for formula in (gold, answer):
            check_for_worker(expression.for_worker(formula))
        raise NotExact("for the computer algebra system")
    return same


def unknown_values(gold: Form) -> list[str]:
    """The formulas in a form that only a computer algebra system can read.

    Raises:
        Unreadable: one that cannot be read at all.
    """
    if gold.kind == "words" or (gold.kind == "value" and letter_of(gold.text)):
        return []
    if gold.kind == "choice":
        return unknown_values(gold.items[0]) if gold.items[0].kind == "value" else []
    if gold.kind == "relation" and (rest := named(gold, of_gold=True)):
        return unknown_values(rest[1])  # nothing is computed of what a label says
    formulas = [units.split(item.text).value for item in _all_values(gold) if not name_of(item)]
    return [formula for formula in formulas if not _infinity(formula) and _value_or_none(formula) is None]


def _all_values(form: Form) -> Iterator[Form]:
    if form.kind == "value":
        yield form
    for item in form.items:
        yield from _all_values(item)


def _infinity(text: str) -> str:
    text = text.replace(" ", "").removeprefix("+")
    return text if text in (r"\infty", r"-\infty") else ""


def _value_or_none(text: str) -> Exact | None:
    try:
        return expression.value(text)
    except NotExact:
        return None


def same_form(gold: Form, answer: Form, same: Same) -> bool:
    """Whether ``answer`` is right.

    Raises:
        NotExact, Unreadable: as ``same`` does.
    """
    if "choice" in (gold.kind, answer.kind):
        return _same_choice(gold, answer, same)
    if gold.kind == "words":
        return answer.kind in ("words", "value") and same_words(gold.text, answer.text)
    if max(len(gold.items), len(answer.items)) > MAX_ITEMS:
        raise Unreadable(f"more than {MAX_ITEMS} values")
    if "family" in (gold.kind, answer.kind):
        return same_family(gold, answer, lambda g, a: same_form(g, a, same))
    if "residue" in (gold.kind, answer.kind):
        return same_residue(gold, answer, lambda g, a: same_form(g, a, same))
    if (told := _same_assignments(gold, answer, same)) is not None:
        return told
    if gold.kind == "relation" and answer.kind == "relation":
        return _same_relation(gold, answer, same)
    if gold.kind in ("tuple", "union") and (region := as_region(answer)):
        return _same_region(gold, region[1], same)
    if answer.kind in ("tuple", "union") and (region := as_region(gold)):
        return _same_region(region[1], answer, same)
    if answer.kind == "relation" and (rest := named(answer)):
        return same_form(gold, rest[1], same)
    if gold.kind == "relation" and (rest := named(gold, of_gold=True)):
        return same_form(rest[1], answer, same)
    return _same_shape(gold, answer, same)


def _same_shape(gold: Form, answer: Form, same: Same) -> bool:
    if gold.kind == answer.kind == "value":
        return _same_quantity(gold.text, answer.text, same)
    if (gold.braced and answer.kind == "set") or (answer.braced and gold.kind == "set"):
        values = [form.items if form.kind == "set" else (form,) for form in (gold, answer)]
        return _same_ordered(values[0], values[1], same)
    if gold.kind in ("list", "set"):
        return _same_collection(gold, ungrouped(answer), same)
    intervals = answer.kind == "list" and all(item.kind == "tuple" for item in answer.items)
    if gold.kind == "union" and intervals and answer.text != "and":  # (0, 1) or (2, 3)
        return _same_unordered(gold.items, answer.items, same)
    if gold.kind != answer.kind:
        return False
    if gold.kind == "union":
        return _same_unordered(gold.items, answer.items, same)
    if gold.kind == "tuple" and gold.text != answer.text:
        return False
    return _same_ordered(gold.items, answer.items, same)


def _same_choice(gold: Form, answer: Form, same: Same) -> bool:
    """``(B) 12`` is the option B, and 12."""
    letters = [form.text if form.kind == "choice" else letter_of(form.text) for form in (gold, answer)]
    if gold.kind == answer.kind:
        values = gold.items[0].kind, answer.items[0].kind
        agree = values != ("value", "value") or same_form(gold.items[0], answer.items[0], same)
        return letters[0] == letters[1] and agree
    if all(letters):
        return letters[0] == letters[1]
    option, other = (gold.items[0], answer) if gold.kind == "choice" else (gold, answer.items[0])
    return option.kind not in ("words", "choice") and other.kind != "words" and same_form(option, other, same)


def _same_assignments(gold: Form, answer: Form, same: Same) -> bool | None:
    """Several names with their values: by name, or in the order of the names. None where this is not for them."""
    golds, answers = assignments(gold), assignments(answer)
    if golds and answers:
        if golds.keys() == answers.keys():
            return all(same_form(golds[name], answers[name], same) for name in golds)
        return None
    names, other = (golds, answer) if golds else (answers, gold)
    if not names or other.kind != "tuple" or other.text != "()":
        return None  # 1, 2 does not say which is which
    in_order = list(names.values()) if golds else [names[name] for name in sorted(names)]
    if golds and gold.kind == "list" and list(names) != sorted(names):
        return False
    pair = (in_order, other.items)
    return _same_ordered(*(pair if golds else pair[::-1]), same)


def _same_region(gold: Form, answer: Form, same: Same) -> bool:
    parts = [form.items if form.kind == "union" else (form,) for form in (gold, answer)]
    return _same_unordered(parts[0], parts[1], same)


def _same_collection(gold: Form, answer: Form, same: Same) -> bool:
    if answer.kind not in ("list", "set"):
        return False
    if {gold.text, answer.text} == {"and", "or"} and any(item.kind == "relation" for item in gold.items):
        return False
    answers = answer.items
    if not any(item.kind == "relation" for item in gold.items):
        plain = without_names(answers)
        if plain is None:
            return False
        answers = plain
        if len(answers) == 1 and answers[0].kind in ("list", "set"):
            answers = answers[0].items
    elif not any(item.kind == "relation" for item in answers):
        plain = without_names(gold.items)
        return plain is not None and _same_unordered(plain, answers, same)
    elif len({root_of(item) for item in (*gold.items, *answers)}) == 1 and root_of(gold.items[0]):
        both = without_names(gold.items), without_names(answers)  # x_1 = 1, x_2 = 2 and x = 1, x = 2
        if both[0] and both[1]:
            return _same_unordered(both[0], both[1], same)
    return _same_unordered(gold.items, answers, same)


def _same_ordered(gold: Sequence[Form], answer: Sequence[Form], same: Same) -> bool:
    return len(gold) == len(answer) and all(same_form(g, a, same) for g, a in zip(gold, answer, strict=True))


def _same_unordered(gold: Sequence[Form], answer: Sequence[Form], same: Same) -> bool:
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        found = next((i for i, candidate in enumerate(left) if same_form(item, candidate, same)), None)
        if found is None:
            return False
        del left[found]
    return True


# --- values with units, percent and degree signs ---------------------------------------------------------------------


def _same_quantity(gold_text: str, answer_text: str, same: Same) -> bool:
    gold, answer = units.split(gold_text), units.split(answer_text)
    if _same_digits(gold_text, answer_text):
        return True
    if gold.mark == answer.mark:
        if not units.compatible(gold.unit, answer.unit):
            return False
        if same(gold.value, answer.value):
            return True
        factors = gold.product or answer.product  # a bare letter beside a number may be no unit
        return bool(factors) and same(gold.product or gold_text, answer.product or answer_text)
    if (gold.unit and answer.mark) or (gold.mark and (answer.mark or answer.unit)):
        return False
    if gold.mark:
        return same(gold.value, answer.value) or same(_scaled(gold), answer.value)
    if answer.mark == "degree" and numbers.plain_number(gold.value) is not None:
        return same(gold.value, answer.value)  # like a unit, the sign may be added
    return same(gold.value, _scaled(answer))


def _scaled(quantity: units.Quantity) -> str:
    """The formula that a percent or degree sign makes of the value before it."""
    factor = r"\frac{1}{100}" if quantity.mark == "%" else r"\frac{\pi}{180}"
    return f"({quantity.value}) \\cdot {factor}"


def _same_digits(gold: str, answer: str) -> bool:
    """``1011`` for ``1011_2``: an answer may leave out the base that the gold has."""
    numeral = numbers.NUMERAL.fullmatch(gold)
    return bool(numeral) and as_written(answer).upper() == (numeral[1] or numeral[4])  # type: ignore[index]


# --- relations -------------------------------------------------------------------------------------------------------


def _same_relation(gold: Form, answer: Form, same: Same) -> bool:
    regions = as_region(gold), as_region(answer)
    if regions[0] and regions[1]:
        return regions[0][0] == regions[1][0] and _same_region(regions[0][1], regions[1][1], same)
    names = named(gold, of_gold=True), named(answer)
    if "in" in gold.signs + answer.signs or (names[0] and names[1] and names[0][0] == names[1][0]):
        return bool(names[0] and names[1] and names[0][0] == names[1][0] and same_form(names[0][1], names[1][1], same))
    if len(gold.signs) != len(answer.signs):
        return False
    if len(gold.signs) != 1 or any(item.kind != "value" for item in gold.items + answer.items):
        return gold.signs == answer.signs and _same_ordered(gold.items, answer.items, same)
    return _same_equation(gold, answer)


def _same_equation(gold: Form, answer: Form) -> bool:
    """Whether two equations (or inequalities) differ by a constant factor alone."""
    try:
        sides = [expression.value(item.text) for item in gold.items + answer.items]
    except NotExact:
        return False
    factor = exact.ratio(sides[0] - sides[1], sides[2] - sides[3])
    if factor is None:
        return False
    sign = answer.signs[0] if factor > 0 else FLIPPED[answer.signs[0]]
    return sign == gold.signs[0]
