"""Makes a task's builder from its rows.

`datasets` is imported when a builder is called: it takes a second and 100 MB, and rows can be had without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from datasets import Dataset

P = ParamSpec("P")


def builds_dataset(rows: Callable[P, list[dict[str, Any]]]) -> Callable[P, Dataset]:
    """``rows``, with what it returns as a ``datasets.Dataset``; arguments, docstring and errors stay."""

    @functools.wraps(rows)
    def build(*args: P.args, **kwargs: P.kwargs) -> Dataset:
        from datasets import Dataset

        return Dataset.from_list(rows(*args, **kwargs))

    build.__name__ = "build"
    return build
