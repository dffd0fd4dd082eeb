r"""MATH and its hard subset to train on, MATH-500 and AIME to evaluate on.

``train`` is one of
    math      MATH (Hendrycks et al., arXiv:2103.03874): its 7500 training and 5000 test problems less MATH-500, 12,000
    math8k    the 8,523 problems of levels 3 to 5 that SimpleRL-Zoo trains Qwen2.5 on (arXiv:2503.18892)
and ``eval`` one of
    math500   500 of MATH's test problems (Lightman et al., arXiv:2305.20050)
    aime2024, aime2025    30 problems each

``answer`` is the row's answer column or, if there is none, the content of the last ``\boxed{}`` in its solution. No
problem of MATH-500 or of the chosen ``eval`` is trained on, whatever the source: texts are compared without regard to
spacing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from data import files, sources

Split = Literal["train", "eval"]

HUB = {
    "math": [sources.Hub("DigitalLearningGmbH/MATH-lighteval", split) for split in ("train", "test")],
    "math8k": [
        sources.Hub("hkust-nlp/SimpleRL-Zoo-Data", "train", {"data_files": "simplelr_qwen_level3to5/train.parquet"})
    ],
    "math500": [sources.Hub("HuggingFaceH4/MATH-500", "test")],
    "aime2024": [sources.Hub("HuggingFaceH4/aime_2024", "train")],
    "aime2025": [sources.Hub("MathArena/aime_2025", "train")],
}
TRAIN, EVAL = ("math", "math8k"), ("math500", "aime2024", "aime2025")
QUESTIONS = {
    "plain": "{problem}",
    # the words that Qwen2.5-Math and SimpleRL-Zoo use
    "boxed": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
}


def build(
    split: Split,
    size: int | None = None,
    seed: int = 0,
    *,
    train: str = "math",
    eval: str = "math500",
    path: str | None = None,
    eval_path: str | None = None,
    levels: Sequence[int] | None = None,
    max_characters: int | None = None,
    question: str = "plain",
    skip_unsound: bool = False,
) -> Dataset:
    """Rows of ``prompt`` and ``answer``: ``size`` of them that the seed picks, in the order of the source.

    ``path`` takes the place of the hub. It is a folder whose .jsonl or .parquet files are named ``train`` and ``test``,
    or by their sources; or it is the file to train on, with ``eval_path`` the file held out. Columns are ``problem``
    (or ``question``) and ``answer`` or ``solution``. Of the training problems, ``levels`` keeps these levels and
    ``max_characters`` keeps problems of at most that length. ``question`` is ``plain``, for a template that says where
    the answer goes, or ``boxed``. ``skip_unsound`` leaves out rows without an answer, with a warning, instead of
    refusing them all: two of math8k have none.

    Raises ValueError if there are no rows, or naming the rows that can't be used.
    """
    for name, value, known in (("split", split, ("train", "eval")), ("train", train, TRAIN), ("eval", eval, EVAL)):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
    if question not in QUESTIONS:
        raise ValueError(f"question is one of {', '.join(QUESTIONS)}, not {question!r}")
    held_out = sources.convert(_load(eval, ("test", "eval"), path, eval_path), row_of, skip_unsound)
    if split == "train":
        rows = sources.convert(_load(train, ("train",), path, None), row_of, skip_unsound)
        if levels is not None:
            rows = _of_levels(rows, levels)
        if max_characters is not None:
            rows = [row for row in rows if len(row["problem"]) <= max_characters]
        texts = {_key(row) for row in [*held_out, *_math500(eval, path)]}
        rows = [row for row in rows if _key(row) not in texts]
        if not rows:
            raise ValueError(
                "every training problem is held out, of another level or too long: nothing is left to train on"
            )
    else:
        rows = held_out
    rows = sources.sample(rows, size, seed)
    template = QUESTIONS[question]
    return Dataset.from_dict(
        {
            "prompt": [template.replace("{problem}", row["problem"]) for row in rows],
            "answer": [row["answer"] for row in rows],
        }
    )


def needs_network(path: str | None = None, **_: Any) -> bool:
    """Whether ``build`` with these arguments asks the hub."""
    return path is None


def _load(name: str, others: Sequence[str], path: str | None, eval_path: str | None) -> list[files.Rows]:
    """The rows of a source: of ``eval_path``, of ``path`` (a folder, or the file to train on), or of the hub."""
    if eval_path is not None:
        return sources.read([eval_path])
    if path is None:
        instead = "give data.args.path: a folder with train.jsonl and test.jsonl (columns problem, answer)"
        return [hub.load(instead) for hub in HUB[name]]
    if Path(path).expanduser().is_dir():
        return sources.read(sources.find_files(path, (name, *others)))
    if name in EVAL:
        raise ValueError(
            f"path: {path} is one file, which is trained on. Give eval_path too, so that none of its problems is, or a "
            f"folder with both"
        )
    return sources.read([path])


def row_of(row: dict[str, Any]) -> dict[str, Any]:
    """Problem, answer and level, from the columns of any of the sources."""
    if isinstance(
        row.get("extra_info"), dict
    ):  # SimpleRL-Zoo's: the prompt beside it has a template around the problem
        row = {"level": row.get("level"), **row["extra_info"]}
    problem = sources.text(row, "problem", "question", "prompt")
    if row.get("answer") is not None and not isinstance(row["answer"], bool):
        answer = str(row["answer"]).strip()  # AIME has integers
    else:
        answer = last_boxed(sources.text(row, "solution"))
    if not answer:
        raise ValueError("no answer: the column is empty")
    return {"problem": problem, "answer": answer, "level": row.get("level")}


def last_boxed(solution: str) -> str:
    r"""The content of the last ``\boxed{}``, by matching braces (``\{`` is none), or the word after ``\boxed``.

    Raises ValueError if there is no box, or it is not closed.
    """
    start = max(solution.rfind(command) for command in ("\\boxed", "\\fbox"))
    if start < 0:
        raise ValueError("no \\boxed{} in column 'solution'")
    content = solution[start:].partition("ed" if solution.startswith("\\boxed", start) else "box")[2].lstrip()
    if not content.startswith("{"):  # \boxed 5
        return content.split()[0].rstrip("$.,") if content.split() else ""
    depth, place = 0, 0
    while place < len(content):
        if content[place] == "\\":
            place += 1  # skips the escaped character
        elif content[place] in "{}":
            depth += 1 if content[place] == "{" else -1
            if depth == 0:
                return content[1:place].strip()
        place += 1
    raise ValueError(f"the last \\boxed{{}} of column 'solution' is not closed: {content[:40]!r}")


def _of_levels(rows: list[dict[str, Any]], levels: Sequence[int]) -> list[dict[str, Any]]:
    """Rows whose level, 3 or ``Level 3``, is one of these."""
    if not any(row["level"] is not None for row in rows):
        raise ValueError("levels: the training problems have no column 'level'")
    wanted = {str(level) for level in levels}
    return [row for row in rows if str(row["level"]).removeprefix("Level ") in wanted]


def _math500(eval: str, path: str | None) -> list[dict[str, Any]]:
    """MATH-500, which is never trained on, even if something else is held out. From a folder, only if it is there."""
    if eval == "math500":
        return []
    if path is None:
        return sources.convert(_load("math500", (), None, None), row_of)
    try:
        found = sources.find_files(path, ("math500",))
    except ValueError:
        return []
    return sources.convert(sources.read(found), row_of)


def _key(row: dict[str, Any]) -> str:
    return " ".join(row["problem"].split())
