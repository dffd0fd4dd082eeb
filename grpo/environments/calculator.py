"""A calculator as a tool: exact arithmetic, read by a grammar and never evaluated as code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

MAX_LENGTH = 400  # characters of an expression
MAX_DEPTH = 100
MAX_BITS = 4096  # of any numerator or denominator on the way, about 1,200 digits
DECIMALS = 12  # that an endless decimal is shown with
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})  # noqa: RUF001
TWO: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


class Calculator:
    """One tool, ``calculate``. It pays nothing: the recipe's other rewards do."""

    def reset(self, **row: object) -> None:
        """Nothing to say, and nothing of the row to read."""

    def calculate(self, expression: str) -> str:
        """Work out an arithmetic expression exactly.

        Args:
            expression: Numbers with + - * / // % ** and parentheses, such as (12 + 3.5) * 2.

        Returns:
            The result.
        """
        return written(value_of(expression))


def value_of(expression: str) -> Fraction:
    """The value of an expression. Raises ValueError, for the model to read, where it has none or is too large."""
    text = expression.translate(SIGNS).strip().removesuffix("=").rstrip()
    if not text:
        raise ValueError("the expression is empty")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the expression has {len(text)} characters, at most {MAX_LENGTH} are read")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"this is no arithmetic: {_brief(text)}") from None
    return _value(tree.body, text, MAX_DEPTH)


def _value(node: ast.expr, text: str, depth: int) -> Fraction:
    if depth == 0:
        raise ValueError("the expression is nested too deeply")
    if isinstance(node, ast.Constant):
        return _number(node, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand, text, depth - 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in (*TWO, ast.Pow):
        left, right = _value(node.left, text, depth - 1), _value(node.right, text, depth - 1)
        if isinstance(node.op, ast.Pow):
            return _bounded(_power(left, right))
        if right == 0 and isinstance(node.op, (ast.Div, ast.FloorDiv, ast.Mod)):
            raise ValueError("division by zero")
        return _bounded(TWO[type(node.op)](left, right))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor):
        raise ValueError("^ is not known; write a power as **")
    if isinstance(node, ast.Tuple):
        raise ValueError("write numbers without commas, and one expression a call")
    part = ast.get_source_segment(text, node) or text
    raise ValueError(f"only numbers, + - * / // % ** and parentheses are known, not {_brief(part)}")


def _number(node: ast.Constant, text: str) -> Fraction:
    """A number as it is written: 0.1 is a tenth."""
    written_as = (ast.get_source_segment(text, node) or "").replace("_", "")
    if type(node.value) not in (int, float):
        raise ValueError(f"only numbers can be calculated with, not {_brief(written_as)}")
    if type(node.value) is int:
        return _bounded(Fraction(node.value))
    mantissa, _, exponent = written_as.lower().partition("e")
    if exponent and abs(int(exponent)) > MAX_BITS // 4:
        raise ValueError(f"{_brief(written_as)} is too large or too small")
    return _bounded(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """Raises ValueError before anything large is made."""
    if exponent.denominator != 1:
        raise ValueError("only whole powers are known")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    size = max(abs(base.numerator), base.denominator).bit_length() - 1
    if size * abs(exponent) > MAX_BITS or abs(exponent) > MAX_BITS:
        raise ValueError("the result of ** is too large")
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > MAX_BITS:
        raise ValueError("a number is too large")
    return value


def written(value: Fraction) -> str:
    """``42``, ``0.125``, or ``1/3 = 0.333333333333…`` where the decimals do not end within ``DECIMALS``."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**DECIMALS
    sign, digits = "-" if value < 0 else "", str(abs(int(scaled))).rjust(DECIMALS + 1, "0")
    decimal = f"{sign}{digits[:-DECIMALS]}.{digits[-DECIMALS:]}"
    if scaled.denominator == 1:
        return decimal.rstrip("0")
    return f"{value} = {decimal}…"


def _brief(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
