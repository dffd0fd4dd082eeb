"""Evaluations beside each other: files that ``grpo eval`` wrote, suite by suite, with the paired test."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.errors import UserError
from grpo.evaluation.statistics import Paired, paired_test
from grpo.files import write_whole
from grpo.report.compare import said_of
from grpo.report.markup import document, e
from grpo.run.read import mapping

SAMPLING = ("num_generations", "temperature", "top_p", "max_completion_length")
HELD_OUT = "held-out tasks"


@dataclass(frozen=True)
class Evaluation:
    """A file of ``grpo eval``. ``shares`` are how often each row was solved, by its number and what it asks; rows with
    a completion that could not be scored are not in it."""

    file: Path
    facts: dict[str, Any]
    shares: dict[tuple[int, str], float]

    @property
    def suite(self) -> str:
        return str(self.facts.get("suite") or HELD_OUT)

    @property
    def rows(self) -> str:
        """The hash of the rows, empty where the file does not say it."""
        return str(mapping(self.facts.get("rows")).get("sha256") or "")

    def text(self) -> str:
        interval = mapping(self.facts.get("interval"))
        ends = [interval.get(end) for end in ("low", "high")]
        said = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if all(isinstance(end, float) for end in ends) else ""
        return f"{self.facts.get('accuracy', 0.0):.3f}{said}"


def is_evaluation(path: Path) -> bool:
    """Whether a path of a command line is an evaluation, or a folder of them, rather than a run folder."""
    return path.suffix == ".json" or (path.is_dir() and not (path / "metrics.jsonl").exists() and bool(_files(path)))


def read_evaluation(file: Path) -> Evaluation:
    """A file of ``grpo eval`` and its samples. Raises UserError where one can't be read, or is none."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as an evaluation: {error}") from None
    if not isinstance(facts, dict) or "samples" not in facts or "judged_by" not in facts:
        raise UserError(f"{file}: no evaluation of grpo eval (it has no samples and judged_by)")
    samples, judged_by = file.parent / Path(str(facts["samples"])).name, facts["judged_by"]
    values: dict[tuple[int, str], list[float | None]] = {}
    try:
        for line in samples.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            values.setdefault((row["prompt_id"], str(row["prompt"])), []).append(
                row["rewards"][row.get("judged_by") or judged_by]
            )
    except OSError as error:
        raise UserError(f"{samples}: the samples of {file.name} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{samples}: not the samples of an evaluation ({type(error).__name__}: {error})") from None
    scored = {key: [v for v in found if v is not None] for key, found in values.items() if None not in found}
    return Evaluation(file, facts, {key: fmean(v >= 1 for v in found) for key, found in scored.items()})


def compare_evaluations(one: Sequence[Evaluation], other: Sequence[Evaluation], letters: tuple[str, str]) -> list[str]:
    """What is to be said of two models on each suite that both were evaluated on: figures, the paired test, and where
    the two were not evaluated alike. Several evaluations of a model on a suite (seeds) are averaged row by row."""
    lines = []
    for suite in dict.fromkeys(evaluation.suite for evaluation in one):
        sides = [[found for found in side if found.suite == suite] for side in (one, other)]
        if all(sides):
            lines += list(_of_suite(suite, sides[0], sides[1], letters))
    return lines


def _of_suite(suite: str, one: list[Evaluation], other: list[Evaluation], letters: tuple[str, str]) -> Iterator[str]:
    figures = (
        f"{letter} {', '.join(x.text() for x in side)}" for letter, side in zip(letters, (one, other), strict=True)
    )
    hashes = {evaluation.rows for evaluation in (*one, *other)}
    found = _paired(one, other, same_rows=len(hashes) == 1 and hashes != {""})
    if found is None:
        yield f"{suite}: {'; '.join(figures)}. No test: they were not evaluated on the same rows."
        return
    yield f"{suite}: {'; '.join(figures)}. {said_of(found, *letters, 'questions')}"
    for key in SAMPLING:
        values = [mapping(side[0].facts.get("sampling")).get(key) for side in (one, other)]
        if values[0] != values[1]:
            yield f"{suite}: sampled differently: {key} is {values[0]} of {letters[0]} and {values[1]} of {letters[1]}."


def _paired(one: list[Evaluation], other: list[Evaluation], *, same_rows: bool) -> Paired | None:
    """The test on the rows of both: by number where the rows are known to be the same ones (templates may differ), or
    else by number and text."""
    shares: list[dict[Any, list[float]]] = [{}, {}]
    texts: dict[Any, str] = {}
    for side, found in zip(shares, (one, other), strict=True):
        for evaluation in found:
            for key, share in evaluation.shares.items():
                side.setdefault(key[0] if same_rows else key, []).append(share)
                texts.setdefault(key[0] if same_rows else key, key[1])
    common = sorted(shares[0].keys() & shares[1].keys())
    if not common:
        return None
    ours, theirs = ([fmean(side[key]) for key in common] for side in shares)
    return paired_test(ours, theirs, [texts[key] for key in common])


# --- what the command line gives -------------------------------------------------------------------------------------


def write_evaluations(paths: Sequence[Path], out: Path) -> list[str]:
    """Compare evaluations, or folders of them, with the first; write the page to ``out``. Returns the lines for a
    terminal. Raises UserError where there are not two, or they share no suite."""
    if len(paths) < 2:
        raise UserError("compare takes two evaluations or more: grpo compare eval/A.json eval/B.json")
    sides = [[read_evaluation(file) for file in (_files(path) if path.is_dir() else [path])] for path in paths]
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(paths))]
    said = [f"{letter}  {path}" for letter, path in zip(letters, paths, strict=True)]
    found = []
    for i in range(1, len(paths)):
        lines = compare_evaluations(sides[0], sides[i], (letters[0], letters[i]))
        if not lines:
            suites = [", ".join(dict.fromkeys(x.suite for x in side)) for side in (sides[0], sides[i])]
            raise UserError(
                f"{paths[0]} ({suites[0]}) and {paths[i]} ({suites[1]}) were evaluated on no suite in common"
            )
        found += lines
    items = "".join(f"<li>{e(line)}</li>" for line in found)
    names = "".join(f"<li>{e(line)}</li>" for line in said)
    body = f"<header><h1>Evaluations beside each other</h1></header><section><ul>{names}</ul><ul>{items}</ul></section>"
    try:
        write_whole(out, document("evaluations beside each other", body))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return [*said, "", *found, "", str(out)]


def of_runs(sides: Sequence[Sequence[Path]], letters: Sequence[str]) -> Iterator[str]:
    """The suites that the runs of sides were evaluated on, each with its newest result, against those of the first."""
    found = [[evaluation for folder in folders for evaluation in _newest(folder / "eval")] for folders in sides]
    for i in range(1, len(sides)):
        yield from compare_evaluations(found[0], found[i], (letters[0], letters[i]))


def _newest(folder: Path) -> list[Evaluation]:
    """The newest evaluation on each suite in a run's folder; files that are none are passed over."""
    newest: dict[str, Evaluation] = {}
    for file in _files(folder):
        try:
            evaluation = read_evaluation(file)
        except UserError:
            continue
        if evaluation.facts.get("suite"):
            newest[evaluation.suite] = evaluation
    return list(newest.values())


def _files(folder: Path) -> list[Path]:
    """The files of evaluations in a folder, the newest last."""
    if not folder.is_dir():
        return []
    return sorted(
        (f for f in folder.glob("*.json") if f.with_suffix(".jsonl").exists()), key=lambda f: f.stat().st_mtime
    )
