"""Published data sets, from the hub or from files with the same columns, turned into our rows.

Rows that can't be used are never dropped in silence. All of them are counted, and the first are named as ``file:line``.
Either nothing is loaded or, if the caller asks for it, they are left out with a warning.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets

from data import files

SUFFIXES = (".jsonl", ".parquet")
T = TypeVar("T")

log = logging.getLogger(__name__)


class _AnyColumns(files.Columns):
    """Accepts any columns. Publishers name theirs differently, so ``row_of`` of ``convert`` checks them."""

    def required(self) -> list[str]:
        return []


@dataclass(frozen=True)
class Hub:
    """Where rows are on the hub: the arguments of ``datasets.load_dataset``."""

    id: str
    split: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def load(self, instead: str) -> files.Rows:
        """The rows. If the hub gives none, raises ValueError, which says what to give ``instead``."""
        try:
            dataset = datasets.load_dataset(self.id, split=self.split, **self.arguments)
        except Exception as error:  # a hub fails in many ways; the message passes any of them on
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"can't load split {self.split!r} of {self.id}: {reason}. Without a network, {instead}"
            ) from error
        return files.check_dataset(dataset, f"{self.id}[{self.split}]", _AnyColumns())


def find_files(path: str | Path, names: Sequence[str]) -> list[Path]:
    """The files in folder ``path`` for the first of ``names`` that has any: ``train.jsonl``, ``train-0-of-2.parquet``.

    Raises ValueError if there is no such folder, or none of the names has a file.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder")
    for name in names:
        found = sorted(file for suffix in SUFFIXES for file in folder.glob(f"{name}*{suffix}"))
        whole = [file for file in found if file.stem == name] or [file for file in found if file.stem[len(name)] == "-"]
        if whole:
            return whole
    raise ValueError(f"{path}: no {' or '.join(f'{name}.jsonl, {name}.parquet' for name in names)} in this folder")


def read(paths: Iterable[str | Path]) -> list[files.Rows]:
    """Rows of files. Raises ValueError like ``files.read_file``, except for missing columns."""
    return [files.read_file(path, _AnyColumns()) for path in paths]


def text(row: dict[str, Any], *names: str) -> str:
    """The first of these columns that the row has. Raises ValueError if it has none, or if it is empty or no text."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise ValueError(f"no column {' or '.join(map(repr, names))} (there are {', '.join(map(repr, row)) or 'none'})")
    if not isinstance(row[name], str):
        raise ValueError(f"column {name!r} is {files.kind(row[name])}, not text")
    if not row[name].strip():
        raise ValueError(f"column {name!r} is empty")
    return row[name]


def convert(parts: Sequence[files.Rows], row_of: Callable[[dict[str, Any]], T], skip_unsound: bool = False) -> list[T]:
    """``row_of`` of every row. A row for which it raises ValueError is unsound.

    Raises ValueError with the places and number of unsound rows. With ``skip_unsound``, warns and leaves them out
    instead. Raises ValueError too if no row is left.
    """
    sound: list[T] = []
    unsound: list[str] = []
    for rows in parts:
        for index in range(len(rows)):
            try:
                sound.append(row_of(rows[index]))
            except ValueError as why:
                unsound.append(f"  {rows.place(index)}: {why}")
    if unsound:
        total = len(sound) + len(unsound)
        shown = unsound[: files.SHOWN] + [f"  and {len(unsound) - files.SHOWN} more"] * (len(unsound) > files.SHOWN)
        source = ", ".join(rows.source for rows in parts)
        if not skip_unsound or not sound:
            lines = [f"{len(unsound)} of {total} rows in {source} can't be used:", *shown]
            lines += ["(skip_unsound: true leaves such rows out)"] if sound else []
            raise ValueError("\n".join(lines))
        lines = [f"{len(unsound)} of {total} rows in {source} are left out:", *shown]
        log.warning("%s", "\n".join(lines))
    return sound


def sample(rows: list[T], size: int | None, seed: int) -> list[T]:
    """``size`` rows that the seed picks, in their original order; all rows if ``size`` is None or there are no more.

    A smaller sample is part of a larger one.
    """
    if size is None or size >= len(rows):
        return rows
    order = list(range(len(rows)))
    random.Random(f"sample/{seed}").shuffle(order)
    return [rows[index] for index in sorted(order[:size])]
