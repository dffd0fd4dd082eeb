"""The process in which a computer algebra system looks at what the exact path cannot decide.

It reads one formula at a time with math-verify's LaTeX parser and compares two with sympy: exactly, never by rounding.
It has no timeouts of its own: whoever started it kills it when it is late (``pool.py``). Lines of JSON in, lines of
JSON out. No text ever meets ``eval``, ``sympify`` or ``parse_expr``: the parser is a grammar that builds sympy objects.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from functools import lru_cache
from typing import Any

from rewards.math import expression, forms
from rewards.math.compare import same_form, same_value, unknown_values
from rewards.math.exact import NotExact
from rewards.math.text_errors import Unreadable
from rewards.processes import die_with_parent, limit_memory

MEMORY = 2 << 30  # bytes of address space
SMALL = 1e-60  # a value computed to 30 digits and above this is not zero
WARM_UP = (
    (r"\sin x", r"\cos(\frac{\pi}{2}-x)"),
    (r"\cos 2x", r"1-2\sin^2 x"),
    (r"\sqrt[3]{2}", r"2^{1/3}"),
    (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}"),
    (r"e^{2x}", r"(e^x)^2"),
    (r"\ln(xy)", r"\ln x+\ln y"),
    (r"|x-1|", r"|1-x|"),
    (r"\log_2 8", "3"),
)
DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)", re.ASCII)


def serve(pipe_in: int, pipe_out: int, parent_pid: int) -> None:
    """Entry point of the process: answer requests until the pipe closes."""
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
    limit_memory(MEMORY)
    sys.setrecursionlimit(3000)
    for formula in WARM_UP:  # imports, and fills the parser's and sympy's caches
        _same_formula(*formula)
    with os.fdopen(pipe_in, "rb") as requests, os.fdopen(pipe_out, "wb", buffering=0) as replies:
        replies.write(b'{"ready": true}\n')
        for line in requests:
            replies.write(json.dumps(answer(json.loads(line))).encode() + b"\n")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """``{"gold": g}`` asks whether g can be read, ``{"gold": g, "answer": a}`` whether a is right.

    The reply is ``{"right": bool}``, or ``{"unreadable": why}``.
    """
    try:
        gold = forms.read_gold(request["gold"])
        if "answer" not in request:
            for formula in unknown_values(gold):
                parse(formula)
            return {"right": True}
        return {"right": same_form(gold, forms.read(request["answer"]), _same)}
    except Unreadable as why:
        return {"unreadable": str(why)}
    except MemoryError:
        return {"unreadable": "it needs too much memory"}
    except RecursionError:
        return {"unreadable": "it is nested too deep"}
    except Exception as why:  # sympy raises all sorts of errors on nonsense; the text is at fault, not the worker
        return {"unreadable": f"{type(why).__name__} in the computer algebra system"}


def _same(gold: str, text: str) -> bool:
    try:
        return same_value(gold, text)
    except NotExact:
        return _same_formula(gold, text)


def _same_formula(gold: str, text: str) -> bool:
    return same_expression(parse(gold), parse(text))


@lru_cache(maxsize=4096)
def parse(formula: str) -> Any:
    """The sympy expression of a formula, unevaluated. Raises Unreadable."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from sympy import Expr, I

    # A decimal is a fraction: sympy must never see a float.
    text = expression.for_worker(formula)
    text = DECIMAL.sub(lambda number: rf"(\frac{{{int(number[1] + number[2])}}}{{{10 ** len(number[2])}}})", text)
    normal = NormalizationConfig(units=False, malformed_operators=True, nits=False, boxed="none")
    try:
        parsed = latex2sympy(
            text,
            is_real=None if re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", text) else True,
            normalization_config=normal,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except (MemoryError, RecursionError):
        raise
    except Exception as why:  # the parser raises bare Exceptions
        raise Unreadable(f"not a formula: {str(why).splitlines()[0][:100]}") from None
    if not isinstance(parsed, Expr):
        raise Unreadable("not a formula of one value")
    return parsed.subs({symbol: I for symbol in parsed.free_symbols if symbol.name == "i"})


def same_expression(gold: Any, other: Any) -> bool:
    """Whether sympy proves two expressions equal, which it may fail to. A difference of almost zero is no proof."""
    from sympy import exp, expand, fraction, simplify, together

    if gold == other:
        return True
    gold, other = gold.doit(), other.doit()
    if gold == other:
        return True
    difference = gold - other
    if _differs_somewhere(difference):
        return False
    # Sines become sums of exponentials. Expanding those often does what simplify takes long for, or fails at.
    if expand(fraction(together(difference.rewrite(exp)))[0]) == 0 or simplify(difference) == 0:
        return True
    return not difference.free_symbols and difference.equals(0) is True


def _differs_somewhere(difference: Any) -> bool:
    """Whether the difference is surely not zero at one of two points. False also where it cannot be computed."""
    from sympy import Rational

    symbols = sorted(difference.free_symbols, key=lambda symbol: symbol.name)
    for numerator in (317, 641):
        point = {symbol: Rational(numerator + 97 * i, 503) for i, symbol in enumerate(symbols)}
        try:
            value = difference.subs(point).evalf(30)
            if value.is_number and value.is_finite and abs(value).evalf(5) > SMALL:
                return True
        except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
            continue
    return False
