r"""Formulas read into exact values by a grammar of our own: the model's text never meets a general parser here.

    sum      := [sign] product { ("+" | "-") product }
    product  := factor { ("*" | "\cdot" | "\times" | "/" | "\div") factor | factor }        left to right
    factor   := [sign] atom [ "!" ] [ "^" exponent ]
    atom     := number | variable | \frac | \binom | \sqrt | function | "(" sum ")" | "{" sum "}" | "[" sum "]"

``3\frac{1}{2}`` and ``3 1/2`` are mixed numbers. Other numbers side by side are refused. ``1/2x`` is x/2.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial
from typing import NoReturn

from rewards.math import exact, functions
from rewards.math.exact import Exact, NotExact, TooLarge
from rewards.math.guard import COMMAND, GREEK, TRIGONOMETRIC, check_for_worker
from rewards.math.text import Unreadable

MAX_FACTORIAL = 3000
MAX_LEVELS = 60
NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+", re.ASCII)
REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\s*\{([0-9]+)\}", re.ASCII)
SCIENTIFIC = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})", re.ASCII)
FRACTION = re.compile(
    r"(?P<sign>[+-]?) ?(?P<whole>[0-9]+(?= ))? ?(?P<top>[0-9]+) ?/ ?(?P<bottom>[0-9]+)"
    r"|(?P<sign_>[+-]?) ?(?P<whole_>[0-9]+)? ?\\frac ?\{(?P<top_>[0-9]+)\} ?\{(?P<bottom_>[0-9]+)\}",
    re.ASCII,
)
INTEGER_FRACTION = re.compile(
    r"\s*\\frac\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9])(?![0-9]))", re.ASCII
)
DERIVATIVE = re.compile(r"\\frac\s*\{\s*d[^{}]*\}\s*\{\s*d\s*[a-z]")
DIGIT = re.compile(r"[0-9]", re.ASCII)
LETTER = re.compile(r"[A-Za-z]")
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
        check_for_worker(text)
        raise
    return result


def plain_number(text: str) -> Fraction | None:
    """An integer, decimal, simple fraction, mixed number or one in scientific notation; None for all else."""
    sign, digits = (-1, text[1:].lstrip(" ")) if text.startswith("-") else (1, text.removeprefix("+"))
    if NUMBER.fullmatch(digits):
        return sign * Fraction(digits.replace(",", ""))
    if match := SCIENTIFIC.fullmatch(text):
        return Fraction(match[1]) * Fraction(10) ** int(match[2])
    if match := REPEATING.fullmatch(digits):
        return sign * _repeating(match)
    if match := FRACTION.fullmatch(text):
        groups = {name.rstrip("_"): group for name, group in match.groupdict().items() if group is not None}
        top, bottom, whole = int(groups["top"]), int(groups["bottom"]), groups.get("whole")
        if bottom and (whole is None or top < bottom):
            magnitude = int(whole or 0) + Fraction(top, bottom)
            return -magnitude if groups["sign"] == "-" else magnitude
    return None


def _repeating(match: re.Match[str]) -> Fraction:
    before, fixed, period = match[1] or "0", match[2], match[3]
    return Fraction(before + "." + (fixed or "0")) + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0

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
        check_for_worker(self.text)
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
            elif self._atom_follows():
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
        if re.compile(r"\{?\s*[0-9.]").match(self.text, self.position):
            raise Unreadable("a number right after something else")
        return bool(following) and (following in "([{\\|" or bool(LETTER.match(following)))

    def factor(self) -> Exact:
        negative = False
        while sign := self.take("+-"):
            negative ^= sign == "-"
        self._deeper()
        base = self._power()
        self.depth -= 1
        return -base if negative else base

    def _power(self) -> Exact:
        base = self.atom()
        if self.take("!"):
            base = self._factorial(base)
        if self.take("^"):
            base = functions.power(base, self._exponent())
            if self.peek() in ("^", "!"):
                raise Unreadable("a power of a power without braces")
        return base

    def _factorial(self, of: Exact) -> Exact:
        n = of.rational
        if n is None:
            self._unknown()
        if n is None or n.denominator != 1 or n < 0 or self.peek() == "!":
            raise Unreadable("a factorial of something else than a natural number")
        if n > MAX_FACTORIAL:
            raise TooLarge("a factorial too large to compute")
        return exact.number(factorial(n.numerator))

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
        if following and following in "0123456789.":
            return self._number()
        if following and following in "([{":
            self.position += 1
            inside = self.sum()
            self.expect({"(": ")", "[": "]", "{": "}"}[following])
            return inside
        if found := self.match(LETTER):
            if found[0] in "fghFGHP" and self.peek() == "(":
                self._unknown()
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
            n, k = self._argument().rational, self._argument().rational
            if n is None or k is None:
                raise NotExact("a binomial coefficient of variables")
            if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n:
                raise Unreadable("a binomial coefficient of something else than natural numbers")
            if n > MAX_FACTORIAL:
                raise TooLarge("a binomial coefficient too large to compute")
            return exact.number(comb(n.numerator, k.numerator))
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
            return exact.number(_repeating(found))
        digits = self._digits()
        if not digits:
            raise Unreadable("a decimal point without digits")
        if subscript := self.match(SUBSCRIPT):  # a number in another base is its digits: 11 is no answer to "11_2"
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
        return exact.atom(name)
