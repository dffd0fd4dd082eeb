"""Rows without those that repeat questions of an evaluation, and the proof of each that is left out.

What counts as a repetition is in ``prompts/overlap.py``. Beside ``OUTPUT`` stand ``….report.json``, with counts and
hashes of what was compared, and ``….dropped.jsonl``: a line for each row left out, with the words that it shares, how
much of the question they are, and both texts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config.find import find_recipe
from grpo.config.load import load_recipe
from grpo.config.suites import find_suite, suite_names
from grpo.errors import RunError, UserError
from grpo.files import write_whole
from grpo.prompts.overlap import COVERED, LONG, QUESTIONS, ROWS, RUN, find_overlaps, question_text
from grpo.prompts.rows import load_parts, read_questions
from grpo.prompts.suite import load_suite, suite_questions
from grpo.run.manifest import sha256

SHOWN = 5  # rows that the screen has proofs of


@dataclass(frozen=True)
class Asked:
    """A question of an evaluation, and where it is from."""

    place: str
    text: str


def decontaminate(rows_file: str, against: Sequence[str], output: Path, column: str | None = None) -> dict[str, Any]:
    """Write the rows of a file that repeat no question of ``against`` into ``output``, and report. Returns the report.

    ``against`` are files of rows, recipes (their held-out rows) and names of suites.

    Raises:
        UserError: a file is unsound, or is none of these.
        RunError: every row repeats a question, or the disk refuses.
    """
    rows, found = read_questions(rows_file, "ROWS", column)
    prompts = [question_text(prompt) for prompt in found]
    sources = {name: asked_of(name) for name in dict.fromkeys(against)}
    questions = [question for found in sources.values() for question in found]
    overlaps = find_overlaps(prompts, [question.text for question in questions])
    gone = {one.row for one in overlaps.found}
    report = {
        "rows": {"file": rows_file, "sha256": sha256(Path(rows_file).expanduser()), "count": len(rows)},
        "against": {name: _facts(name, found) for name, found in sources.items()},
        "kept": len(rows) - len(gone),
        "dropped": dict(sorted(Counter(one.how for one in overlaps.found).items())),
        "templates": {"rows": overlaps.by_template, "words": overlaps.templates},
        "rules": {
            "run": LONG,
            "short_run": RUN,
            "covered": COVERED,
            "template": {"rows": ROWS, "questions": QUESTIONS},
        },
    }
    dropped = [
        {
            "row": rows.place(one.row),
            "how": one.how,
            "against": questions[one.question].place,
            "shared": one.shared,
            "covers": round(one.covers, 4),
            "prompt": prompts[one.row],
            "question": questions[one.question].text,
        }
        for one in overlaps.found
    ]
    kept = [rows[row] for row in range(len(rows)) if row not in gone]
    write_results(output, report, dropped, {output: kept})
    if not kept:
        raise RunError(f"every row of {rows_file} repeats a question ({dropped_of(output)} has the proofs)")
    return report


def asked_of(name: str) -> list[Asked]:
    """The questions that ``--against`` names. Raises UserError."""
    if Path(name).suffix.lower() in (".jsonl", ".parquet", ".csv"):
        rows, questions = read_questions(name, "--against")
        return [Asked(rows.place(i), question_text(question)) for i, question in enumerate(questions)]
    if name in suite_names():
        loaded = load_suite(name, find_suite(name), 0)
        return [Asked(loaded.rows.place(i), text) for i, text in enumerate(suite_questions(loaded))]
    try:
        find_recipe(name)
    except UserError as error:
        raise UserError(f"--against {name}: neither a file of rows, a suite nor a recipe: {error}") from None
    recipe = load_recipe(name)
    held_out = load_parts(
        recipe.data, recipe.training, recipe.stage, environment=recipe.environment is not None
    ).held_out
    if not len(held_out):
        raise UserError(f"--against {name}: the recipe holds out no rows (data.eval_size is 0)")
    return [
        Asked(share.place(row), question_text(question))
        for share in held_out.shares
        for row, question in share.values(share.data.prompt_column).items()
    ]


def _facts(name: str, questions: Sequence[Asked]) -> dict[str, Any]:
    file = Path(name).expanduser()
    return {"questions": len(questions)} | ({"sha256": sha256(file)} if file.is_file() else {})


# --- what is written -------------------------------------------------------------------------------------------------


def report_of(output: Path) -> Path:
    return output.with_suffix(".report.json")


def dropped_of(output: Path) -> Path:
    return output.with_suffix(".dropped.jsonl")


def write_results(
    output: Path, report: dict[str, Any], dropped: Sequence[dict[str, Any]], rows: dict[Path, list[dict[str, Any]]]
) -> None:
    """The report, what was left out, and the rows of each file, the report last. Raises RunError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for file, content in {**rows, dropped_of(output): dropped}.items():
            write_whole(file, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in content))
        write_whole(report_of(output), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"{output}: cannot be written: {error.strerror or error}") from error


def lines(report: dict[str, Any], output: Path) -> Iterator[str]:
    """The report for a terminal."""
    total, gone = report["rows"]["count"], report["rows"]["count"] - report["kept"]
    questions = sum(of["questions"] for of in report["against"].values())
    yield f"{gone:,} of {total:,} rows repeat one of {questions:,} questions and are left out"
    for how, count in report["dropped"].items():
        yield f"  {how:<10}  {count:>8,}"
    with dropped_of(output).open(encoding="utf-8") as proofs:
        for line, _ in zip(proofs, range(SHOWN), strict=False):
            one = json.loads(line)
            yield f"  {one['row']} and {one['against']} ({one['how']}): {_brief(one['shared'])}"
    if report["templates"]["rows"]:
        yield (
            f"{report['templates']['rows']:,} more share words of templates alone, and stay: "
            f"{_brief(report['templates']['words'][0])}"
        )
    yield f"{report['kept']:,} rows: {output}; {dropped_of(output).name} proves, {report_of(output).name} counts"


def _brief(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
