"""GSM8K: grade-school word problems with one number each (Cobbe et al., arXiv:2110.14168).

7473 problems to train on and 1319 held out, from ``openai/gsm8k`` on the hub or from files with its columns
``question`` and ``answer``. ``answer`` there is the worked solution with ``#### 72`` at its end. Here it is the number
alone, for the reward ``math``. The solution is dropped, because no reward needs it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from data import sources

Split = Literal["train", "eval"]

HUB = {
    "train": sources.Hub("openai/gsm8k", "train", {"name": "main"}),
    "eval": sources.Hub("openai/gsm8k", "test", {"name": "main"}),
}
FILES = {"train": ("train",), "eval": ("test", "eval")}
NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?", re.ASCII)


def build(
    split: Split,
    size: int | None = None,
    seed: int = 0,
    *,
    path: str | None = None,
    eval_path: str | None = None,
    skip_unsound: bool = False,
) -> Dataset:
    """Rows of ``prompt`` (the problem) and ``answer`` (its number, without commas): ``size`` that the seed picks.

    ``path`` takes the place of the hub: a folder with ``train`` and ``test`` as .jsonl or .parquet, or the file to
    train on, with ``eval_path`` the file held out. ``skip_unsound`` leaves out rows without a number, with a warning,
    instead of refusing them all. Raises ValueError if there are no rows, or naming the unsound ones.
    """
    if split not in FILES:
        raise ValueError(f"split is train or eval, not {split!r}")
    if split == "eval" and eval_path is not None:
        parts = sources.read([eval_path])
    elif path is None:
        parts = [HUB[split].load("give data.args.path: a folder with train.jsonl and test.jsonl")]
    elif Path(path).expanduser().is_dir():
        parts = sources.read(sources.find_files(path, FILES[split]))
    elif split == "train":
        parts = sources.read([path])
    else:
        raise ValueError(f"path: {path} is one file, which is trained on: give eval_path too, or a folder with both")
    return Dataset.from_list(sources.sample(sources.convert(parts, row_of, skip_unsound), size, seed))


def needs_network(path: str | None = None, **_: Any) -> bool:
    """Whether ``build`` with these arguments asks the hub."""
    return path is None


def row_of(row: dict[str, Any]) -> dict[str, str]:
    question, solution = sources.text(row, "question"), sources.text(row, "answer")
    number = solution.rpartition("####")[2].strip() if "####" in solution else ""
    if not NUMBER.fullmatch(number):
        raise ValueError(f"column 'answer' must end in #### and a number, got {solution[-40:]!r}")
    return {"prompt": question, "answer": number.replace(",", "")}
