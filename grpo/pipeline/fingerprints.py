"""Hashes of what a stage is made from and of what it makes, without torch. Large files are hashed once: whoever has
their hashes from before need not read a file whose size and time are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo import user_code
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.run.manifest import sha256
from grpo.run.named_files import code_files, files_in_args

NOT_OF_A_MODEL = ("README.md", "training_args.bin")  # in its folder, and no part of it

Facts = dict[str, dict[str, Any]]  # by a file's name: sha256, bytes, time


def facts_of(path: Path, before: Mapping[str, Any] | None = None) -> Facts:
    """Of a model's folder, or of a file. Raises UserError where there is none."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    files = [file for file in files if file.name not in NOT_OF_A_MODEL and not file.name.startswith(".")]
    return {file.name: _facts(file, (before or {}).get(file.name)) for file in files}


def hash_of(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash of the files' content."""
    return digest({name: of["sha256"] for name, of in facts.items()})


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def named_files(recipe: Recipe, *, model: bool, rows: bool, teacher: bool) -> dict[str, str]:
    """Hashes of the files here that a recipe names, by key: code of the user's own, what rewards read, and of model,
    rows and teacher those that are the recipe's own."""
    files = code_files(recipe) | files_in_args(recipe)
    paths = {}
    for source in recipe.data.sources():
        data, key = source.rows, f"{source.where}.name"
        if data.name and user_code.is_place(data.name):
            files |= {f"{key}: {name}": file for name, file in user_code.sources_of(data.name, key).items()}
        paths[f"{source.where}.eval_path"] = data.eval_path
        paths |= {f"{source.where}.path": data.path} if rows else {}
    paths |= {"model.name": recipe.model.name} if model else {}
    paths |= {"model.tokenizer": recipe.model.tokenizer}
    paths |= {"teacher.name": getattr(getattr(recipe, "teacher", None), "name", None)} if teacher else {}
    found = {name: sha256(file) for name, file in files.items()}
    for key, path in paths.items():
        if path and Path(path).exists():  # a hub's id is in the recipe, with its revision
            found[key] = hash_of(facts_of(Path(path)))
    return found


def _facts(file: Path, before: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        status = file.stat()
        if before and (before["bytes"], before["time"]) == (status.st_size, status.st_mtime_ns):
            return dict(before)
        return {"sha256": sha256(file), "bytes": status.st_size, "time": status.st_mtime_ns}
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
