"""The rows of a run: those to train on and those held out, each as shares of one source or several."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.config import RowsConfig

if TYPE_CHECKING:
    from data.files import Rows


@dataclass(frozen=True)
class Share:
    """Rows of one source. A row's id in the run is its place in ``rows`` plus ``first``. ``source`` is the label of
    `data.mix`, and empty without it; ``data`` says how its rows become prompts."""

    source: str
    data: RowsConfig
    rows: Rows
    ids: Sequence[int]
    first: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def values(self, column: str) -> dict[int, Any]:
        """A column by ids of rows; many times faster than reading rows one by one."""
        values = self.rows.column(column)
        return {row: values[row - self.first] for row in self.ids}

    def row(self, row: int) -> dict[str, Any]:
        return self.rows[row - self.first]

    def place(self, row: int) -> str:
        return self.rows.place(row - self.first)


@dataclass(frozen=True)
class Part:
    """The rows to train on, or those held out: a share of each source, in the order of the recipe."""

    shares: tuple[Share, ...]

    @cached_property
    def ids(self) -> list[int]:
        return [row for share in self.shares for row in share.ids]

    @cached_property
    def _firsts(self) -> list[int]:
        return [share.first for share in self.shares]

    def __len__(self) -> int:
        return len(self.ids)

    def share(self, row: int) -> Share:
        """The share that a row belongs to, by its id."""
        return self.shares[bisect_right(self._firsts, row) - 1]

    def row(self, row: int) -> dict[str, Any]:
        """A row's columns."""
        return self.share(row).row(row)

    def place(self, row: int) -> str:
        """Where a row is from, as ``file:line``."""
        return self.share(row).place(row)


class Parts(NamedTuple):
    """The rows of a run. ``notes`` tells a person what is unexpected: rows left out, fewer rows than asked for."""

    train: Part
    held_out: Part
    notes: list[str]
