"""Reads rows from files and checks that each is sound.

Unsound rows are named as ``file:line`` (in parquet and hub data the line is the row, counted from 1), and all
of them are counted. One bad row in a million would otherwise surface hours into a run, or never.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

SHOWN = 10  # unsound rows that a message spells out


@dataclass(frozen=True)
class Rows:
    """Sound rows, and where they come from: row ``i`` is line ``lines[i]`` of ``source``, by default ``i + 1``."""

    rows: Sequence[dict[str, Any]]
    source: str
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def column(self, name: str) -> list[Any]:
        if not isinstance(self.rows, list):
            return self.rows.select_columns(name).to_dict()[name]  # many times faster than one row at a time
        return [row[name] for row in self.rows]

    def place(self, index: int) -> str:
        return f"{self.source}:{index + 1 if self.lines is None else self.lines[index]}"


@dataclass(frozen=True)
class Columns:
    """Columns that every row must have: the prompt and, for supervised data, the completion."""

    prompt: str = "prompt"
    completion: str | None = None

    def required(self) -> list[str]:
        return [self.prompt] if self.completion is None else [self.prompt, self.completion]


def read_file(path: str | Path, columns: Columns) -> Rows:
    """Rows of a ``.jsonl``, ``.parquet`` or ``.csv`` file.

    Raises ValueError with one line for each unsound row: bytes that are not UTF-8, JSON that is cut or no object, a
    missing column, a type that differs from the first row's, a prompt that is neither text nor messages. A blank line
    is unsound too, except at the end.
    """
    file = Path(path).expanduser()
    if not os.path.isfile(file):
        what = "is a folder" if file.is_dir() else "is no plain file" if file.exists() else "no such file"
        raise ValueError(f"{path}: {what}" + ("" if Path(path).is_absolute() else f" (from {Path.cwd()})"))
    kind_of_file = file.suffix.lower()
    if kind_of_file == ".parquet":
        import datasets  # takes a second and 100 MB, which a .jsonl does without
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(file)
            table.validate(full=True)  # also that text is UTF-8, which a row would tell hours later
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file ({_first_line(error)})") from error
        return check_dataset(datasets.Dataset(table), str(path), columns)
    read = {".jsonl": _read_jsonl, ".csv": _read_csv}.get(kind_of_file)
    if read is None:
        raise ValueError(f"{path}: give a .jsonl, .parquet or .csv file")
    try:
        return read(file, str(path), columns)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def column_names(path: str | Path) -> list[str]:
    """The columns of a file's first row; none where ``read_file`` would say what is wrong with it."""
    file = Path(path).expanduser()
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return list(pq.read_schema(file).names)
        with file.open(encoding="utf-8-sig") as opened:
            first = opened.readline()
    except (OSError, ValueError):  # pyarrow's own errors are ValueErrors
        return []
    if file.suffix.lower() == ".csv":
        marked = max((next(csv.reader([first], delimiter=mark), []) for mark in ",;\t"), key=len)
        return [name.strip() for name in marked]
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(first)
        return list(row) if isinstance(row, dict) else []
    return []


def check_dataset(dataset: datasets.Dataset, source: str, columns: Columns) -> Rows:
    """Rows of a data set, whose columns have types already. Checks that columns are there and texts are sound.

    Raises ValueError like ``read_file``.
    """
    missing = [name for name in columns.required() if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{source}: no column {' or '.join(missing)}; its columns are {', '.join(dataset.column_names) or 'none'} "
            f"(data.prompt_column and data.completion_column say which to take)"
        )
    check = _RowCheck(columns)
    texts = dataset.select_columns(columns.required()).to_dict()
    rows = (dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=True))
    _raise_if_any(source, ((line, check(row)) for line, row in enumerate(rows, 1)))
    return _not_empty(Rows(dataset, source))


def _read_jsonl(file: Path, source: str, columns: Columns) -> Rows:
    check = _RowCheck(columns)
    rows: list[dict[str, Any]] = []

    def problems() -> Iterator[tuple[int, str | None]]:
        blank: list[int] = []
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    blank.append(number)
                    continue
                yield from ((before, "blank line") for before in blank)
                blank.clear()
                row, problem = _parse(line)
                if problem is None:
                    problem = check(row)
                    rows.append(row)
                yield number, problem

    _raise_if_any(source, problems())
    return _not_empty(Rows(rows, source))


def _read_csv(file: Path, source: str, columns: Columns) -> Rows:
    """Rows of a CSV file whose first line names the columns, parted by commas, semicolons or tabs. Every value is text,
    an empty one is null; a column whose values are all JSON lists or objects is read as these."""
    usual_limit = csv.field_size_limit(sys.maxsize)  # csv's own is less than a prompt with a document in it
    numbers, rows = [], []
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            first = text.readline()
            text.seek(0)
            mark, before = _delimiter(first, columns), 0
            lines = csv.reader(text, strict=True, delimiter=mark, skipinitialspace=f"{mark} " in first)
            for row in lines:
                if row:  # a blank line is none
                    numbers.append(before + 1)
                    rows.append(row)
                before = lines.line_num  # a value between quotes may go over lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from error
    except csv.Error as error:
        raise ValueError(f"{source}: not readable as CSV: line {lines.line_num}: {error}") from error
    finally:
        csv.field_size_limit(usual_limit)
    if not rows:
        raise ValueError(f"{source}: no rows")
    header, *rows = rows
    numbers, header = numbers[1:], [name.strip() for name in header]
    if wrong := [name for name in header if not name or header.count(name) > 1]:
        raise ValueError(f"{source}: the first line names the columns; {wrong[0]!r} is empty or there twice")
    if missing := [name for name in columns.required() if name not in header]:
        raise ValueError(
            f"{source}: the first line names the columns; there is no {' or '.join(missing)}, but "
            f"{', '.join(map(repr, header))} (data.prompt_column and data.completion_column say which to take)"
        )
    lengths = (None if len(row) == len(header) else f"{len(row)} values for {len(header)} columns" for row in rows)
    _raise_if_any(source, zip(numbers, lengths, strict=True))
    values = [_csv_column(column) for column in zip(*rows, strict=True)]
    found = [dict(zip(header, row, strict=True)) for row in zip(*values, strict=True)]
    check = _RowCheck(columns)
    _raise_if_any(source, ((number, check(row)) for number, row in zip(numbers, found, strict=True)))
    return _not_empty(Rows(found, source, numbers))


def _delimiter(first_line: str, columns: Columns) -> str:
    """What parts the names of the first line: that with which it names the columns that must be there."""
    for delimiter in ",;\t":
        names = [name.strip() for name in next(csv.reader([first_line], delimiter=delimiter), [])]
        if names and set(columns.required()) <= set(names):
            return delimiter
    return ","


def _csv_column(texts: Sequence[str]) -> list[Any]:
    if all(text[:1] in ("", "[", "{") for text in texts):
        with contextlib.suppress(ValueError, RecursionError):
            return [json.loads(text) if text else None for text in texts]
    return [text or None for text in texts]


class _Twice(Exception):
    """A key that an object of JSON holds twice; Python's reader would take the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return found


def _parse(line: bytes) -> tuple[Any, str | None]:
    try:
        return json.loads(line.decode("utf-8-sig").strip(), object_pairs_hook=_object), None
    except _Twice as error:
        return None, f"the key {error.args[0]!r} is there twice"
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON, or cut off ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return None, f"JSON that can't be read ({error})"


class _RowCheck:
    """What is wrong with a row, in words, or None. The first row with a sound prompt sets the types."""

    def __init__(self, columns: Columns):
        self.columns = columns
        self.kinds: dict[str, str | None] | None = None

    def __call__(self, row: Any) -> str | None:
        try:
            return self._problem(row)
        except RecursionError:
            return "nested too deeply"

    def _problem(self, row: Any) -> str | None:
        if not isinstance(row, dict):
            return f"not an object of columns but {kind(row)}"
        problems = [self._text_problem(name, row) for name in self.columns.required()]
        problems.append(_blank_prompt(self.columns.prompt, row.get(self.columns.prompt)))
        if self.kinds is None:
            if not any(problems):
                self.kinds = {name: kind(value) for name, value in row.items()}
        else:
            problems += self._differences(row, self.kinds)
        return "; ".join(dict.fromkeys(filter(None, problems))) or None

    def _text_problem(self, name: str, row: dict[str, Any]) -> str | None:
        if name not in row:
            return f"column {name!r} is missing (there are {', '.join(map(repr, row)) or 'none'})"
        return _text_problem(name, row[name])

    def _differences(self, row: dict[str, Any], kinds: dict[str, str | None]) -> Iterator[str]:
        for name in sorted(kinds.keys() - row.keys() - set(self.columns.required())):
            yield f"column {name!r} is missing"
        for name, value in row.items():
            found = kind(value)
            if name not in kinds:
                yield f"column {name!r} is not in the first row"
            elif kinds[name] is None or (kinds[name] == "an empty list" and found and "list" in found):
                kinds[name] = found  # the first rows left it open
            elif found not in (None, kinds[name]) and not _list_like(found, kinds[name]):
                yield f"column {name!r} is {found}, in the first row it is {kinds[name]}"


def _list_like(found: str, expected: str | None) -> bool:
    """An empty list fits any list, and any list fits a mixed one."""
    lists = expected is not None and "list" in expected and "list" in found
    return lists and ("empty" in found or expected == "a mixed list")


def kind(value: Any) -> str | None:
    """The type of a JSON value in words; None for null, which any column may hold."""
    if value is None:
        return None
    if isinstance(value, list):
        inner = {kind(item) for item in value}
        if not inner:
            return "an empty list"
        return f"a list of {str(inner.pop()).split(' ', 1)[-1]}s" if len(inner) == 1 else "a mixed list"
    for types, name in ((bool, "a boolean"), (int | float, "a number"), (str, "a string"), (dict, "an object")):
        if isinstance(value, types):
            return name
    return f"a {type(value).__name__}"


def _text_problem(column: str, value: Any) -> str | None:
    if isinstance(value, str):
        if not value:
            return f"column {column!r} is empty"
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"column {column!r} holds half a surrogate pair at character {error.start + 1}"
        return None
    if not isinstance(value, list):
        return f"column {column!r} is {kind(value) or 'null'}, not a string or a list of messages"
    if not value:
        return f"column {column!r} is an empty list of messages"
    for place, message in enumerate(value, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"column {column!r}: message {place} is not an object with the strings role and content"
    return None


def _is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: it is white space, control characters, and marks without a width."""
    return all(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs") for character in text)


def _blank_prompt(column: str, value: Any) -> str | None:
    """A prompt of white space alone asks nothing, and some tokenizers make no token of it."""
    if isinstance(value, str):
        return f"column {column!r} is blank" if value and _is_blank(value) else None
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None  # told by another check
    spoken = [message for message in value if message.get("role") != "system"] or value
    if spoken and all(isinstance(m.get("content"), str) and _is_blank(m["content"]) for m in spoken):
        return f"column {column!r}: no message has a text"
    return None


def _raise_if_any(source: str, checked: Iterable[tuple[int, str | None]]) -> None:
    """Go through all rows, then raise with the first few unsound ones and the number of the rest."""
    shown: list[str] = []
    unsound = total = 0
    for line, problem in checked:
        total += 1
        if problem is not None:
            unsound += 1
            if unsound <= SHOWN:
                shown.append(f"  {source}:{line}: {problem}")
    if unsound > SHOWN:
        shown.append(f"  and {unsound - SHOWN} more")
    if unsound == total and total > 1:
        shown.append("every row is: do data.prompt_column and data.completion_column name the right columns?")
    if unsound:
        raise ValueError("\n".join([f"{unsound} of {total} rows in {source} are corrupt:", *shown]))


def _not_empty(rows: Rows) -> Rows:
    if not len(rows):
        raise ValueError(f"{rows.source}: no rows")
    return rows


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
