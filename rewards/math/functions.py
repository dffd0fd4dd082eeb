r"""Functions beyond quotients of polynomials: powers, roots, logarithms, sines. Exact where that is cheap, else opaque.

An opaque value is an atom that stands for a function of exact arguments. Two formulas with the same atoms in the same
places are equal. Others may be equal too (sin 2x, 2 sin x cos x). They surely differ if their values differ clearly
when numbers are put in for the variables; otherwise the computer algebra system decides.
"""

from __future__ import annotations

import cmath
import math
import zlib
from dataclasses import dataclass, field
from fractions import Fraction

from rewards.math import exact
from rewards.math.exact import Exact, NotExact, Polynomial

MAX_FACTORED = 10**9  # the largest integer that is factored
MAX_TEXT = 4000  # characters that identify an atom
CLEARLY = 1e-6  # relative; far above the error of floating point, so that no right answer is refused for it
SEEDS = (b"1", b"2")


@dataclass(frozen=True)
class Opaque:
    """``text`` identifies the atom; equal texts are equal functions of equal arguments."""

    text: str
    function: str = field(compare=False)
    arguments: tuple[Exact, ...] = field(compare=False)

    def __str__(self) -> str:
        return self.text


def opaque(function: str, *arguments: Exact) -> Exact:
    """An atom for a function of exact values. Raises NotExact where it is too complicated."""
    text = f"{function}({'; '.join(map(_text, arguments))})"
    if len(text) > MAX_TEXT:  # tan(tan(...)) names its argument twice at every level
        raise NotExact("functions of functions of functions")
    return exact.atom(Opaque(text, function, arguments))


def power(base: Exact, exponent: Exact) -> Exact:
    """``base ** exponent``, whatever the exponent is.

    Raises:
        NotExact: it is too complicated.
        TooLarge: it has too many digits.
        ZeroDivisionError: zero to a power that is not positive.
    """
    try:
        return exact.power(base, exponent)
    except NotExact:
        by, value = exponent.rational, base.rational
        if by is None or value is None or value <= 0 or max(value.as_integer_ratio()) > MAX_FACTORED:
            return opaque("^", base, exponent)
    result = exact.number(1)
    for prime, times in _primes(value).items():
        whole, rest = divmod(times * by, 1)
        result = result * exact.power(exact.number(prime), exact.number(whole))
        if rest:
            root = opaque("^", exact.number(prime), exact.number(Fraction(1, rest.denominator)))
            result = result * exact.power(root, exact.number(rest.numerator))
    return result


def log(of: Exact, base: Exact | None = None) -> Exact:
    """The natural logarithm, or the one to a base. Logarithms of rational numbers are sums of those of primes.

    Raises:
        ZeroDivisionError: of zero, or to the base 1.
    """
    if base is not None:
        return log(of) / log(base)
    value = of.rational
    if value == 0:
        raise ZeroDivisionError("the logarithm of zero")
    if exact.equal(of, exact.atom("e")):
        return exact.number(1)
    if value is None or value < 0 or max(value.as_integer_ratio()) > MAX_FACTORED:
        return opaque("ln", of)
    result = exact.number(0)
    for prime, times in _primes(value).items():
        result = result + exact.number(times) * opaque("ln", exact.number(prime))
    return result


def trigonometric(name: str, of: Exact) -> Exact:
    """sin, cos and their quotients; the inverse and hyperbolic functions."""
    if name in ("sin", "cos"):
        return opaque(name, of)
    sin, cos, one = opaque("sin", of), opaque("cos", of), exact.number(1)
    quotients = {"tan": (sin, cos), "cot": (cos, sin), "sec": (one, cos), "csc": (one, sin)}
    if name in quotients:
        top, bottom = quotients[name]
        return top / bottom
    return opaque({"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(name, name), of)


def same(a: Exact, b: Exact) -> bool | None:
    """Whether two values are equal; None where that is not known here."""
    if exact.equal(a, b):
        return True
    if not _has_opaque(a) and not _has_opaque(b):
        return False
    for seed in SEEDS:
        try:
            x, y = _number(a, seed), _number(b, seed)
        except (ArithmeticError, ValueError):  # undefined there, or too large for a float
            continue
        if cmath.isfinite(x) and cmath.isfinite(y) and abs(x - y) > CLEARLY * (1 + abs(x) + abs(y)):
            return False
    return None


def _primes(value: Fraction) -> dict[int, int]:
    """The exponents of the primes in a positive rational number."""
    found: dict[int, int] = {}
    for n, sign in ((value.numerator, 1), (value.denominator, -1)):
        p = 2
        while p * p <= n:
            while n % p == 0:
                found[p] = found.get(p, 0) + sign
                n //= p
            p += 1 if p == 2 else 2
        if n > 1:
            found[n] = found.get(n, 0) + sign
    return found


def _text(value: Exact) -> str:
    parts = [
        sorted(
            (radicand, [(str(name), times) for name, times in powers], str(factor)) for (radicand, powers), factor in p
        )
        for p in (value.top.items(), value.bottom.items())
    ]
    return repr(parts)


def _has_opaque(value: Exact) -> bool:
    return any(isinstance(name, Opaque) for p in (value.top, value.bottom) for _, powers in p for name, _ in powers)


def _number(value: Exact, seed: bytes) -> complex:
    """The value with a number in place of every variable, derived from its name and ``seed``."""
    return _of_polynomial(value.top, seed) / _of_polynomial(value.bottom, seed)


def _of_polynomial(polynomial: Polynomial, seed: bytes) -> complex:
    total = 0j
    for (radicand, powers), factor in polynomial.items():
        term = complex(float(factor) * math.sqrt(radicand))
        for name, times in powers:
            term *= _of_atom(name, seed) ** times
        total += term
    return total


def _of_atom(name: str | Opaque, seed: bytes) -> complex:
    if isinstance(name, str):
        constants = {"pi": cmath.pi, "e": cmath.e, "i": 1j}
        return constants.get(name) or 0.3 + zlib.crc32(seed + name.encode()) / 2**31
    arguments = [_number(argument, seed) for argument in name.arguments]
    if name.function == "^":
        return arguments[0] ** arguments[1]
    return getattr(cmath, {"ln": "log"}.get(name.function, name.function))(arguments[0])
