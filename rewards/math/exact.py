"""Exact numbers and rational functions: what most answers are, decided without a computer algebra system.

A value is a quotient of two polynomials with rational coefficients over the atoms: square roots of square-free
integers, i, pi, e and variables. Products of square roots are reduced, so a polynomial is zero only if it has no terms,
and two quotients are equal if and only if a * d - b * c has none. No floating point anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

MAX_BITS = 1 << 15  # of a numerator or denominator; 2006! has 19,254
MAX_TERMS = 300
MAX_RADICAND = 10**15  # factoring it takes 10^5 divisions at most

Monomial = tuple[int, tuple[tuple[Any, int], ...]]  # square-free radicand, powers of atoms in order of their names
Polynomial = dict[Monomial, Fraction]
ONE: Monomial = (1, ())


class NotExact(ValueError):
    """The value cannot be represented here; a computer algebra system may know it."""


class TooLarge(ValueError):
    """Computing it would cost more than an answer is worth."""


@dataclass(frozen=True, eq=False)
class Exact:
    """``top / bottom``. Compare with ``equal``; ``==`` is not defined on purpose."""

    top: Polynomial
    bottom: Polynomial

    @property
    def rational(self) -> Fraction | None:
        """The value, if it is a rational number."""
        if self.top.keys() <= {ONE} and self.bottom.keys() == {ONE}:
            return self.top.get(ONE, Fraction(0)) / self.bottom[ONE]
        return None

    def __add__(self, other: Exact) -> Exact:
        if self.bottom == other.bottom:
            return _exact(_sum(self.top, other.top), self.bottom)
        top = _sum(_product(self.top, other.bottom), _product(other.top, self.bottom))
        return _exact(top, _product(self.bottom, other.bottom))

    def __neg__(self) -> Exact:
        return Exact({key: -value for key, value in self.top.items()}, self.bottom)

    def __sub__(self, other: Exact) -> Exact:
        return self + -other

    def __mul__(self, other: Exact) -> Exact:
        return _exact(_product(self.top, other.top), _product(self.bottom, other.bottom))

    def __truediv__(self, other: Exact) -> Exact:
        """Raises ZeroDivisionError."""
        if not other.top:
            raise ZeroDivisionError("division by zero")
        return _exact(_product(self.top, other.bottom), _product(self.bottom, other.top))


def number(value: int | Fraction) -> Exact:
    return Exact({ONE: Fraction(value)} if value else {}, {ONE: Fraction(1)})


def atom(name: Any) -> Exact:
    """A variable, one of the constants "pi", "e" and "i" (whose square is -1), or an object that stands for a value."""
    return Exact({(1, ((name, 1),)): Fraction(1)}, {ONE: Fraction(1)})


def equal(a: Exact, b: Exact) -> bool:
    """Whether they are the same, as numbers or as rational functions."""
    if a.bottom == b.bottom:
        return a.top == b.top
    return _product(a.top, b.bottom) == _product(b.top, a.bottom)


def ratio(a: Exact, b: Exact) -> Fraction | None:
    """The constant c, not zero, with a = c * b, taken as equations ``a = 0`` and ``b = 0``: denominators drop out."""
    if not a.top or a.top.keys() != b.top.keys():
        return None
    ratios = {a.top[key] / b.top[key] for key in a.top}
    return ratios.pop() if len(ratios) == 1 else None


def power(base: Exact, exponent: Exact) -> Exact:
    """``base ** exponent`` for a rational exponent.

    Raises:
        NotExact: the result is not a value of this kind.
        TooLarge: it has too many digits.
        ZeroDivisionError: a negative power of zero.
    """
    by = exponent.rational
    if by is None:
        raise NotExact("an exponent that is not a rational number")
    if by.denominator != 1:
        rational = base.rational
        if by.denominator != 2 and (rational is None or rational < 0):
            raise NotExact("a root of something that is not a positive number")
        return power(root(base, by.denominator), number(by.numerator))
    times, value = by.numerator, base.rational
    if value is not None:
        size = max(value.numerator.bit_length(), value.denominator.bit_length())
        if abs(times) > MAX_BITS or (abs(value) != 1 and size * abs(times) > MAX_BITS):
            raise TooLarge("a power with too many digits")
        if value == 0 and times <= 0:
            raise ZeroDivisionError("zero to a power that is not positive")
        return number(value**times)
    if times < 0:
        return number(1) / power(base, number(-times))
    if times > MAX_BITS:
        raise TooLarge("a power that is too high")
    if len(base.top) + len(base.bottom) > 2 and times > 64:
        raise NotExact("a high power of a sum")
    result = number(1)
    while times:
        if times & 1:
            result = result * base
        times >>= 1
        if times:
            base = base * base
    return result


def root(value: Exact, degree: int) -> Exact:
    """The real root of a rational number; for ``degree`` 2, the number may be negative.

    Raises:
        NotExact: the root is not a rational number, or, for degree 2, not a multiple of a square root.
    """
    radicand = value.rational
    if radicand is None or degree < 2:
        raise NotExact("a root of something that is not a rational number")
    if degree == 2:
        outside, inside = _square_free(abs(radicand.numerator) * radicand.denominator)
        powers = (("i", 1),) if radicand < 0 else ()
        if not radicand:
            return number(0)
        return Exact({(inside, powers): Fraction(outside, radicand.denominator)}, {ONE: Fraction(1)})
    if degree > 64 or (radicand < 0 and degree % 2 == 0):
        raise NotExact("not a real root")
    roots = [_integer_root(abs(part), degree) for part in radicand.as_integer_ratio()]
    sign = -1 if radicand < 0 else 1
    return number(sign * Fraction(roots[0], roots[1]))


def _square_free(n: int) -> tuple[int, int]:
    """(a, b) with n = a * a * b and b square-free."""
    if n > MAX_RADICAND:
        whole = math.isqrt(n)
        if whole * whole == n:
            return whole, 1
        raise NotExact("the root of a large number")
    outside, inside, p = 1, 1, 2
    while p * p * p <= n:
        count = 0
        while n % p == 0:
            n //= p
            count += 1
        outside *= p ** (count // 2)
        inside *= p ** (count % 2)
        p += 1 if p == 2 else 2
    whole = math.isqrt(n)  # n is now 1, a prime, a product of two primes or the square of one
    return (outside * whole, inside) if whole * whole == n else (outside, inside * n)


def _integer_root(n: int, degree: int) -> int:
    low, high = 0, 1 << (n.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= n else (low, middle - 1)
    if low**degree != n:
        raise NotExact("a root that is not a rational number")
    return low


def _exact(top: Polynomial, bottom: Polynomial) -> Exact:
    """A quotient; a denominator that is a number goes into the numerator."""
    if bottom.keys() == {ONE} and bottom[ONE] != 1:
        factor = bottom[ONE]
        return Exact({key: value / factor for key, value in top.items()}, {ONE: Fraction(1)})
    return Exact(top, bottom)


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    result = dict(a)
    for key, value in b.items():
        total = result.get(key, Fraction(0)) + value
        if total:
            result[key] = _bounded(total)
        else:
            del result[key]
    return _few(result)


def _product(a: Polynomial, b: Polynomial) -> Polynomial:
    if len(a) * len(b) > 8 * MAX_TERMS:
        raise NotExact("a product of long sums")
    result: Polynomial = {}
    for (root_a, powers_a), value_a in a.items():
        for (root_b, powers_b), value_b in b.items():
            common = math.gcd(root_a, root_b)
            value = value_a * value_b * common
            powers = dict(powers_a)
            for name, exponent in powers_b:
                powers[name] = powers.get(name, 0) + exponent
            if "i" in powers:
                value = -value if powers["i"] % 4 in (2, 3) else value
                powers["i"] %= 2
            key = (
                root_a * root_b // common**2,
                tuple(sorted(((name, times) for name, times in powers.items() if times), key=_name)),
            )
            total = result.get(key, Fraction(0)) + value
            if total:
                result[key] = _bounded(total)
            else:
                result.pop(key, None)
    return _few(result)


def _name(power: tuple[Any, int]) -> str:
    return str(power[0])


def _few(terms: Polynomial) -> Polynomial:
    if len(terms) > MAX_TERMS:
        raise NotExact("a sum of many terms")
    return terms


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooLarge("a number with too many digits")
    return value
