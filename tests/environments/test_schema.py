"""Tools' schemas: what transformers makes of the same functions, and what is missing in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Optional, Union

import pytest
from transformers.utils import get_json_schema

from grpo.environments.schema import NoSchema, schema_of


def plain(a: int, b: float, c: str, d: bool, e: list, f: dict, g: Any) -> None:
    """
    Of basic types.

    Args:
        a: One.
        b: Two,
            over two lines.
        c: Three
        d: Four (or: five).
        e: Five

        f: Six, after a blank line.
        g: Seven.
    """


def nested(
    a: list[list[int]],
    b: dict[str, float],
    c: tuple[int, str],
    d: Literal["x", "y"],
    e: Literal[1, "y"],
    f: list[str] | None = None,
    g: Union[int, str] = 1,  # noqa: UP007
    h: Optional[float] = None,  # noqa: UP045
    i: list[int] | str = "",
    j: int | str | None = None,
) -> dict[str, list[int]]:
    """Of nested types. It says more.

    And more still.

    Args:
        a: One.
        b: Two.
        c: Three.
        d: Four.
        e: Five.
        f: Six.
        g: Seven.
        h: Eight.
        i: Nine.
        j: Ten.

    Returns:
        What it found, as
        a dict.

    Raises:
        ValueError: never.
    """
    return {}


def chosen(drink: str) -> str:
    """Drink.

    Args:
        drink: Which one (choices: ["tea", "coffee"])

    Returns: the taste.
    """
    return drink


class Own:
    def method(self, thing: Own, count: int = 2) -> None:
        """A method.

        Args:
            thing: An object of a class.
            count: How many.
        """

    @staticmethod
    def of_class(x: int) -> int:
        """Static.

        Args:
            x: A number.

        Returns:
            int: The number.
        """
        return x

    def alone(self):
        """No arguments, no hints."""


@pytest.mark.parametrize("function", [plain, nested, Own().method, Own.of_class, Own().alone, Own.method])
def test_as_transformers_makes_it(function: Callable[..., Any]) -> None:
    assert schema_of(function) == get_json_schema(function)


def test_choices_as_transformers_reads_them() -> None:
    ours, theirs = schema_of(chosen)["function"], get_json_schema(chosen)["function"]
    assert ours["parameters"] == theirs["parameters"]


def undescribed(a: int) -> None:
    """Says nothing of its argument."""


def unhinted(a) -> None:
    """No hint.

    Args:
        a: One.
    """


def bare(a: int) -> None:
    pass


def starred(*args: int) -> None:
    """Stars."""


def unknown(a: NotThere) -> None:  # type: ignore[name-defined]  # noqa: F821
    """A hint that is nothing.

    Args:
        a: One.
    """


def of_any_length(a: tuple[int, ...]) -> None:
    """A tuple.

    Args:
        a: One.
    """


def called(a: Callable[[int], int]) -> None:
    """A function.

    Args:
        a: One.
    """


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (undescribed, "the docstring does not describe argument 'a'"),
        (unhinted, "argument 'a' has no type hint"),
        (bare, "it has no docstring"),
        (starred, "*args: 'int' cannot be given by name"),
        (unknown, "name 'NotThere' is not defined"),
        (of_any_length, "write list[…]"),
        (called, "JSON has no type for collections.abc.Callable"),
    ],
)
def test_what_is_missing(function: Callable[..., Any], says: str) -> None:
    with pytest.raises(NoSchema) as why:
        schema_of(function)
    assert says in str(why.value)
