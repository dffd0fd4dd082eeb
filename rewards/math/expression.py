r"""Formulas read into exact values by a grammar of our own: the model's text never meets a general parser here.

    sum      := [sign] product { ("+" | "-") product }
    product  := factor { ("*" | "\cdot" | "\times" | "/" | "\div") factor | factor }        left to right
    factor   := [sign] atom [ "!" ] [ "^" exponent ] [ "\%" | "^\circ" ]
    atom     := number | variable | \frac | \binom | \sqrt | function | "(" sum ")" | "{" sum "}" | "[" sum "]"

``3\frac{1}{2}`` and ``3 1/2`` are mixed numbers. A number may follow a bracket or "!", or be the base of a power
after a variable (``n 2^{n-1}``); other numbers side by side are refused. ``1/2x`` is x/2. A degree is pi/180.
"""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction
from functools import lru_cache
from typing import NoReturn

from rewards.math import exact, functions
from rewards.math.exact import Exact, NotExact, TooLarge
from rewards.math.guard import ACCENTS, COMMAND, GREEK, TRIGONOMETRIC, check_for_worker
from rewards.math.numbers import NUMBER, NUMERAL, REPEATING, plain_number, repeating
from rewards.math.text_errors import Unreadable

MAX_LEVELS = 60
INTEGER_FRACTION = re.compile(
    r"\s*\\frac\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9])(?![0-9]))", re.ASCII
)
DERIVATIVE = re.compile(r"\\frac\s*\{\s*d[^{}]*\}\s*\{\s*d\s*[a-z]")
DIGIT = re.compile(r"[0-9]", re.ASCII)
LETTER = re.compile(r"[A-Za-z]")
ACCENTED = re.compile(r"\s*(?:\{\s*([A-Za-z])\s*\}|([A-Za-z])(?![A-Za-z]))")
PRIMES = re.compile(r" ?'+")
CALL = re.compile(r"\s*\(\s*((?:-?[0-9]+|[a-z])(?:\s*,\s*(?:-?[0-9]+|[a-z]))*)\s*\)")
MARK = re.compile(r" ?(?:\\%|\\degree(?![A-Za-z]))")
DIGITS_FOLLOW = re.compile(r"\s*\{?\s*[0-9.]")
BASE_OF_POWER = re.compile(r"\s*[0-9]+\s*\^", re.ASCII)
SUBSCRIPT = re.compile(r"\s*_\s*(?:\{\s*([A-Za-z0-9]+)\s*\}|([A-Za-z0-9]))", re.ASCII)


@lru_cache(maxsize=4096)
def value(text: str) -> Exact:
    """The exact value of a canonical formula.

    Raises:
        NotExact: ``exact.py`` cannot represent it, if it has one; the text may go to the worker.
        Unreadable: it has none, or one that is too large.
    """
    plain = plain_number(text)
    if plain is not None:
        return exact.number(plain)
    if DERIVATIVE.search(text):
        raise Unreadable("a derivative")
    try:
        parser = _Parser(text)
        result = parser.sum()
        parser.expect_end()
    except ZeroDivisionError:
        raise Unreadable("a division by zero") from None
    except TooLarge as why:
        raise Unreadable(str(why)) from None
    except NotExact:
        check_for_worker(for_worker(text))
        raise
    return result


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0
        self.edits: list[tuple[int, int, str]] = []  # what makes the text plain to another parser: start, end, instead

    def _deeper(self) -> None:
        """Enter one more level of nesting. Raises Unreadable beyond MAX_LEVELS."""
        self.depth += 1
        if self.depth > MAX_LEVELS:
            raise Unreadable(f"more than {MAX_LEVELS} levels of signs, brackets and commands")

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Take what ``pattern`` matches here."""
        found = pattern.match(self.text, self.position)
        if found:
            self.position = found.end()
        return found

    def peek(self) -> str:
        while self.position < len(self.text) and self.text[self.position] == " ":
            self.position += 1
        return self.text[self.position : self.position + 1]

    def take(self, symbols: str) -> str:
        """The next character, if it is one of ``symbols``."""
        found = self.peek()
        if found and found in symbols:
            self.position += 1
            return found
        return ""

    def expect(self, symbol: str) -> None:
        if not self.take(symbol):
            raise Unreadable(f"expected {symbol} at {self.text[self.position :][:20]!r}")

    def expect_end(self) -> None:
        if self.peek():
            self._unknown()

    def _unknown(self) -> NoReturn:
        """Give up on text outside of the grammar."""
        raise NotExact(f"not in the grammar: {self.text[self.position :][:20]!r}")

    def sum(self) -> Exact:
        result = self.product()
        while sign := self.take("+-"):
            result = result + self.product() if sign == "+" else result - self.product()
        return result

    def product(self) -> Exact:
        result = self.factor()
        while True:
            if operator := self._operator():
                right = self.factor()
                result = result * right if operator == "*" else result / right
            elif self._number_follows() or self._atom_follows():
                result = result * self.factor()
            else:
                return result

    def _operator(self) -> str:
        if symbol := self.take("*/"):
            return symbol
        if self.peek() == "\\":
            command = COMMAND.match(self.text, self.position)
            if command and command[1] in ("cdot", "times", "div"):
                self.position = command.end()
                return "/" if command[1] == "div" else "*"
        return ""

    def _atom_follows(self) -> bool:
        following = self.peek()
        return bool(following) and (following in "([{\\|" or bool(LETTER.match(following))) and not self._mark_follows()

    def _number_follows(self) -> bool:
        """Whether a number goes on with a product: after a bracket, or as the base of a power after a variable."""
        if not DIGITS_FOLLOW.match(self.text, self.position):
            return False
        before = self.text[: self.position].rstrip()[-1:]
        is_base = re.match(r"[A-Za-z}\]]", before) and BASE_OF_POWER.match(self.text, self.position)
        if before not in (")", "!") and not is_base:
            raise Unreadable("a number right after something else")
        self.edits.append((self.position, self.position, r"\cdot "))
        return True

    def _mark_follows(self) -> bool:
        return bool(MARK.match(self.text, self.position))

    def factor(self) -> Exact:
        negative = False
        while sign := self.take("+-"):
            negative ^= sign == "-"
        self._deeper()
        base = self._power()
        self.depth -= 1
        return -base if negative else base

    def _power(self) -> Exact:
        self.peek()
        start = self.position
        base = self.atom()
        if self.take("!"):
            base = self._factorial(base)
        if self.take("^"):
            base = functions.power(base, self._exponent())
            if self.peek() in ("^", "!"):
                raise Unreadable("a power of a power without braces")
        self.peek()
        before = self.position
        if mark := self.match(MARK):
            of, plain = (100, r"\cdot\frac{1}{100})") if mark[0][1] == "%" else (180, r"\cdot\frac{\pi}{180})")
            base = base * exact.number(Fraction(1, of))
            base = base if of == 100 else base * exact.atom("pi")
            self.edits += [(start, start, "("), (before, mark.end(), plain)]
        return base

    def _factorial(self, of: Exact) -> Exact:
        if self.peek() == "!":
            raise Unreadable("a factorial of a factorial")
        return functions.factorial(of)

    def _exponent(self) -> Exact:
        if self.take("-"):
            return -self.factor()
        if found := self._digits():
            return exact.number(Fraction(found))
        return self.atom()

    def _digits(self) -> str:
        self.peek()
        found = self.match(NUMBER)
        if found and "," in found[0]:
            return found[0].replace(",", "")
        return found[0] if found else ""

    def atom(self) -> Exact:
        following = self.peek()
        if found := self.match(NUMERAL):  # a number in another base is its digits: 11 is no answer to "11_2"
            return exact.atom(f"{found[1] or found[4]}_{found[2] or found[3] or found[5]}")
        if following and following in "0123456789.":
            return self._number()
        if following and following in "([{":
            self.position += 1
            inside = self.sum()
            self.expect({"(": ")", "[": "]", "{": "}"}[following])
            return inside
        if found := self.match(LETTER):
            return self._variable(found[0])
        command = self.match(COMMAND)
        if command is None:
            if not following or following in ")]}*/^_!,":
                raise Unreadable("a formula that is not complete")
            self._unknown()
        return self._command(command[1])

    def _command(self, name: str) -> Exact:
        if name == "pi":
            return exact.atom("pi")
        if name in GREEK:
            return self._variable("\\" + name)
        if name == "frac":
            top = self._argument()
            return top / self._argument()
        if name == "sqrt":
            degree = 2
            if self.take("["):
                of = self.sum().rational
                self.expect("]")
                if of is None or of.denominator != 1 or not 2 <= of <= 1000:
                    raise Unreadable("a root of a strange degree")
                degree = of.numerator
            return self._root(self._argument(), degree)
        if name == "binom":
            return functions.binomial(self._argument(), self._argument())
        if name in ACCENTS and (letter := self.match(ACCENTED)):
            return self._variable(f"\\{name}{{{letter[1] or letter[2]}}}")
        if name in TRIGONOMETRIC or name in ("ln", "log", "exp"):
            return self._function(name)
        return self._unknown()

    def _root(self, radicand: Exact, degree: int) -> Exact:
        try:
            return exact.root(radicand, degree)
        except NotExact:
            return functions.power(radicand, exact.number(Fraction(1, degree)))

    def _function(self, name: str) -> Exact:
        exponent, base = None, exact.number(10) if name == "log" else None
        if name == "log" and self.take("_"):
            base = self._argument()
        if self.take("^"):
            exponent = self._exponent()
            if exponent.rational == -1 and name in ("sin", "cos", "tan"):
                name, exponent = "arc" + name, None
        of = self._function_argument()
        if name == "exp":
            result = functions.power(exact.atom("e"), of)
        elif name in ("ln", "log"):
            result = functions.log(of, base)
        else:
            result = functions.trigonometric(name, of)
        return result if exponent is None else functions.power(result, exponent)

    def _function_argument(self) -> Exact:
        """A group, or all that follows the function's name up to the next function or sum: ``\\sin 2x \\cos x``."""
        if self.peek() in ("(", "{"):
            return self.atom()
        self._deeper()
        result = self._power()
        while self._atom_follows() and not self._function_follows():
            result = result * self._power()
        if DIGITS_FOLLOW.match(self.text, self.position):
            raise Unreadable("a number right after something else")
        self.depth -= 1
        if self.peek() in ("*", "/") or (COMMAND.match(self.text, self.position) and not self._function_follows()):
            self._unknown()  # whether the argument goes on behind the operator is ambiguous
        return result

    def _function_follows(self) -> bool:
        self.peek()
        command = COMMAND.match(self.text, self.position)
        return bool(command) and command[1] in TRIGONOMETRIC | {"ln", "log", "exp"}  # type: ignore[index]

    def _argument(self) -> Exact:
        """What a command applies to: a group, or, as in TeX, one character or command."""
        if self.take("{"):
            inside = self.sum()
            self.expect("}")
            return inside
        if digit := self.match(DIGIT):
            return exact.number(int(digit[0]))
        if letter := self.match(LETTER):
            return exact.atom(letter[0])
        if command := self.match(COMMAND):
            self._deeper()
            argument = self._command(command[1])
            self.depth -= 1
            return argument
        raise Unreadable("a command without what it applies to")

    def _number(self) -> Exact:
        if found := self.match(REPEATING):
            return exact.number(repeating(found))
        digits = self._digits()
        if not digits:
            raise Unreadable("a decimal point without digits")
        if subscript := self.match(SUBSCRIPT):
            return exact.atom(f"{digits}_{subscript[1] or subscript[2]}")
        if digits.isdigit() and (fraction := INTEGER_FRACTION.match(self.text, self.position)):
            top, bottom = (int(fraction[i] or fraction[i + 1]) for i in (1, 3))
            if not 0 < top < bottom:
                raise Unreadable("a number beside a fraction that is not less than one")
            self.position = fraction.end()
            return exact.number(int(digits) + Fraction(top, bottom))
        return exact.number(Fraction(digits))

    def _variable(self, name: str) -> Exact:
        if subscript := self.match(SUBSCRIPT):
            name += "_" + (subscript[1] or subscript[2])
        if primes := self.match(PRIMES):
            name += primes[0].strip()
        if name.rstrip("'") in ("f", "g", "F", "G") and (call := self.match(CALL)):  # g(R+h) may be a product
            return functions.opaque("call " + name, *(value(argument.strip()) for argument in call[1].split(",")))
        return exact.atom(name)


def for_worker(text: str) -> str:
    """A formula as another parser reads it, too: with every product and degree written out."""
    parser = _Parser(text)
    with contextlib.suppress(NotExact, Unreadable, TooLarge, ZeroDivisionError):
        parser.sum()
    for start, end, instead in sorted(parser.edits, reverse=True):
        text = text[:start] + instead + text[end:]
    return text
