"""The built-in calculator: exact, bounded, and with errors that a model can read."""

from __future__ import annotations

import time

import pytest

from grpo.environments.calculator import Calculator

calculate = Calculator().calculate


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        (" 27 * 14 ", "378"),
        ("38 + 378 =", "416"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "1/3 = 0.333333333333…"),
        ("-2/3", "-2/3 = -0.666666666666…"),
        ("7 // 2", "3"),
        ("-7 % 3", "2"),
        ("2 ** -3", "0.125"),
        ("(12 + 3.5) × 2 ÷ 4 − 1", "6.75"),  # noqa: RUF001
        ("1.5e3", "1500"),
        ("-0.0", "0"),
    ],
)
def test_results_are_exact(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "the expression is empty"),
        ("1" * 401, "401 characters, at most 400"),
        ("(1", "this is no arithmetic"),
        ("7!", "this is no arithmetic"),
        ("1,234 * 2", "write numbers without commas"),
        ("2 ^ 3", r"write a power as \*\*"),
        ("1 / (2 - 2)", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("2 ** 0.5", "only whole powers"),
        ("9 ** 9 ** 9", "too large"),
        ("1e999999999", "too large"),
        ("10 ** 1200 * 10 ** 1200", "a number is too large"),
        ("-" * 300 + "1", "nested too deeply"),
        ("__import__('os').getpid()", "only numbers"),
        ("True + 1", "only numbers"),
        ("'a' * 3", "only numbers"),
        ("2j", "only numbers"),
        ("x", "only numbers"),
        ("(y := 1)", "only numbers"),
    ],
)
def test_what_it_does_not_do_is_told(expression, said):
    with pytest.raises(ValueError, match=said):
        calculate(expression)


def test_no_expression_takes_long():
    begun = time.perf_counter()
    for expression in ("**".join(["99"] * 100), "*".join(["99**640"] * 50), "~" * 400):
        with pytest.raises(ValueError, match=r"large|arithmetic|deeply|only"):
            calculate(expression)
    assert time.perf_counter() - begun < 1
