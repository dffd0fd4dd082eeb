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
from rewards.math.exact import Exact, NotExact, Polynomial, TooLarge
from rewards.math.text_errors import Unreadable

MAX_FACTORED = 10**9  # the largest integer that is factored
MAX_FACTORIAL = 3000
MAX_SHIFT = 8  # of (n+8)! and 2^(n+8)
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
        shift = exponent.top.get(exact.ONE, Fraction(0))
        if by is None and shift and shift.denominator == 1 and abs(shift) <= MAX_SHIFT and _is_polynomial(exponent):
            return power(base, exponent - exact.number(shift)) * exact.power(base, exact.number(shift))  # 2^n / 2
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
    """sin, cos and their quotients; the inverse and hyperbolic functions. Raises ZeroDivisionError at a pole."""
    if name in ("sin", "cos"):
        return _sine(of) if name == "sin" else _cosine(of)
    sin, cos, one = _sine(of), _cosine(of), exact.number(1)
    quotients = {"tan": (sin, cos), "cot": (cos, sin), "sec": (one, cos), "csc": (one, sin)}
    if name in quotients:
        top, bottom = quotients[name]
        return top / bottom
    return opaque({"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(name, name), of)


def _sine(of: Exact) -> Exact:
    """Of multiples of pi in terms of angles from 0 to pi/2, in roots where those are multiples of 15 degrees."""
    turns = _over_pi(of)
    if turns is None:
        return opaque("sin", of)
    turns %= 2
    sign = 1 if turns <= 1 else -1
    turns = min(turns % 1, 1 - turns % 1)
    twelfths = turns * 12
    if twelfths.denominator > 1:
        return exact.number(sign) * opaque("sin", exact.number(turns) * exact.atom("pi"))
    roots = {0: (), 1: ((6, 1), (2, -1)), 2: ((1, 2),), 3: ((2, 2),), 4: ((3, 2),), 5: ((6, 1), (2, 1)), 6: ((1, 4),)}
    result = exact.number(0)
    for radicand, quarters in roots[int(twelfths)]:
        result = result + exact.number(Fraction(sign * quarters, 4)) * exact.root(exact.number(radicand), 2)
    return result


def _cosine(of: Exact) -> Exact:
    turns = _over_pi(of)
    if turns is None:
        return opaque("cos", of)
    return _sine(exact.number(Fraction(1, 2) + turns) * exact.atom("pi"))


def _over_pi(value: Exact) -> Fraction | None:
    """q where the value is q pi, else None."""
    if not value.top:
        return Fraction(0)
    return exact.ratio(value, exact.atom("pi")) if _is_polynomial(value) else None


def factorial(of: Exact) -> Exact:
    """``of!``; of a sum with variables in terms of the factorial without its integer: (n+1)! is (n+1) n!.

    Raises:
        TooLarge: it has too many digits.
        Unreadable: of a number that is not natural.
    """
    n = of.rational
    if n is not None:
        if n.denominator != 1 or n < 0:
            raise Unreadable("a factorial of something else than a natural number")
        if n > MAX_FACTORIAL:
            raise TooLarge("a factorial too large to compute")
        return exact.number(math.factorial(n.numerator))
    if not _is_polynomial(of):
        raise NotExact("a factorial of a quotient")
    shift = of.top.get(exact.ONE, Fraction(0))
    if shift.denominator != 1 or abs(shift) > MAX_SHIFT:
        return opaque("!", of)
    rest = of - exact.number(shift)
    result, one = opaque("!", rest), exact.number(1)
    for i in range(1, int(shift) + 1):
        result = result * (rest + exact.number(i))
    for i in range(int(shift) + 1, 1):
        result = result * (one / (rest + exact.number(i)))
    return result


def binomial(n: Exact, k: Exact) -> Exact:
    """n over k, with variables as a quotient of factorials. Raises as ``factorial`` does."""
    if n.rational is None or k.rational is None:
        if k.rational is not None and k.rational.denominator == 1 and 0 <= k.rational <= MAX_SHIFT:
            result = exact.number(1)
            for i in range(int(k.rational)):
                result = result * (n - exact.number(i)) * exact.number(Fraction(1, i + 1))
            return result
        return factorial(n) / (factorial(k) * factorial(n - k))
    if n.rational.denominator != 1 or k.rational.denominator != 1 or not 0 <= k.rational <= n.rational:
        raise Unreadable("a binomial coefficient of something else than natural numbers")
    if n.rational > MAX_FACTORIAL:
        raise TooLarge("a binomial coefficient too large to compute")
    return exact.number(math.comb(int(n.rational), int(k.rational)))


def _is_polynomial(value: Exact) -> bool:
    return value.bottom == {exact.ONE: Fraction(1)}


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
    if name.function == "!":
        return complex(math.gamma(_real(arguments[0]) + 1))
    if name.function.startswith("call "):  # any smooth function will do that no other has
        seeds = [zlib.crc32(seed + bytes([i]) + name.function.encode()) / 2**31 for i in range(len(arguments) + 1)]
        return cmath.sin(seeds[-1] + sum(s * argument for s, argument in zip(seeds, arguments, strict=False)))
    return getattr(cmath, {"ln": "log"}.get(name.function, name.function))(arguments[0])


def _real(value: complex) -> float:
    if abs(value.imag) > 1e-12:
        raise ValueError("not a real number")
    return value.real


def real_value(value: Exact) -> float:
    """A number without variables, in floating point. Raises ValueError."""
    atoms = {name for part in (value.top, value.bottom) for _, powers in part for name, _ in powers}
    if any(isinstance(name, str) and name not in ("pi", "e") for name in atoms):
        raise ValueError("not a number")
    return _real(_number(value, SEEDS[0]))
