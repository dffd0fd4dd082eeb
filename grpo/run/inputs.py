"""What a run is made from, beside its recipe: hashes of rows, model, tokenizer and the user's code.

They are in ``environment.json`` and in every checkpoint, so that a run does not go on from other inputs unnoticed
(``same_run.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpo.config import ModelConfig, Recipe
from grpo.errors import UserError
from grpo.model.files import hub_commits, input_files
from grpo.prompts.task import Task
from grpo.run.manifest import sha256
from grpo.run.named_files import code_files, files_in_args

AT_ONCE = 1000  # rows


def hash_inputs(recipe: Recipe, task: Task) -> dict[str, str]:
    """A hash of each input, by a name that says the recipe's key and what it is. Called by the first process alone.

    Raises UserError where a file cannot be read.
    """
    hashes = _of_files(input_files(recipe.model) | code_files(recipe) | files_in_args(recipe))
    rows: dict[str, Any] = {}
    for train, held_out in zip(task.train.shares, task.held_out.shares, strict=True):
        of = f" of {train.source}" if train.source else ""
        rows[f"data: rows{of}"] = train.rows
        if held_out.rows is not train.rows:
            rows[f"data: held-out rows{of}"] = held_out.rows
    return hashes | hub_commits(recipe.model) | {name: rows_hash(of) for name, of in rows.items()}


def hash_model(model: ModelConfig) -> dict[str, str]:
    """The hashes of a model's files and its tokenizer's, or their commits on the hub. Raises UserError as above."""
    return _of_files(input_files(model)) | hub_commits(model)


def _of_files(files: dict[str, Path]) -> dict[str, str]:
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing and reading leave the interpreter's lock
        return dict(zip(files, pool.map(_of_file, files, files.values()), strict=True))


def _of_file(name: str, file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise UserError(f"{name}: {file} cannot be read: {error.strerror or error}") from error


def rows_hash(rows: Any) -> str:
    """A hash of rows' contents, in their order."""
    digest = hashlib.sha256()
    for row in _all(rows):
        digest.update(row_bytes(row))
    return digest.hexdigest()


def _all(rows: Any) -> Iterator[dict[str, Any]]:
    if isinstance(rows.rows, list):
        yield from rows.rows
        return
    for start in range(0, len(rows), AT_ONCE):  # many times faster than one row at a time
        columns: Any = rows.rows[start : start + AT_ONCE]
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def row_bytes(row: Any) -> bytes:
    """A row's content: the same bytes for equal values, in every process."""
    return json.dumps(row, sort_keys=True, default=_plain).encode() + b"\n"


def _plain(value: Any) -> str:
    """A value that JSON does not have. Of an object whose text is an address, the type alone counts."""
    text = value.hex() if isinstance(value, bytes) else str(value)
    return type(value).__name__ if " at 0x" in text else text
