"""``grpo data decontaminate``: rows without what repeats an evaluation, the proofs, and mistakes in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from grpo.cli.main import app
from grpo.pipeline.decontaminate import decontaminate, dropped_of, report_of
from grpo.prompts.words import words
from tests.prompts.word_problems import WRITTEN, from_templates


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    texts = [*from_templates(300), WRITTEN[0].upper(), WRITTEN[4].replace("baker", "grocer")]
    return write(tmp_path / "rows.jsonl", [{"prompt": text, "answer": str(i)} for i, text in enumerate(texts)])


@pytest.fixture
def suite(tmp_path: Path) -> str:
    return write(tmp_path / "suite.jsonl", [{"problem": text, "id": i} for i, text in enumerate(WRITTEN)])


def test_rows_report_and_proofs(rows: str, suite: str, tmp_path: Path) -> None:
    output = tmp_path / "out" / "clean.jsonl"
    report = decontaminate(rows, [suite], output)
    kept = read(output)
    assert kept == [row for row in read(Path(rows)) if int(row["answer"]) < 300]
    assert (report["kept"], report["rows"]["count"]) == (300, 302)
    assert report == json.loads(report_of(output).read_text(encoding="utf-8"))
    exact, changed = read(dropped_of(output))
    assert (exact["row"], exact["against"], exact["how"]) == (f"{rows}:301", f"{suite}:1", "exact")
    assert (changed["row"], changed["against"]) == (f"{rows}:302", f"{suite}:5")
    assert changed["how"] == "13 words"
    assert changed["shared"] in " ".join(words(WRITTEN[4])) != changed["shared"]
    assert changed["question"] == WRITTEN[4]


def test_twice_the_same_bytes(rows: str, suite: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    decontaminate(rows, [suite], one)
    decontaminate(rows, [suite], other)
    for of in (lambda file: file, report_of, dropped_of):
        assert of(one).read_bytes() == of(other).read_bytes()


def test_against_a_recipe_are_its_held_out_rows(rows: str, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.jsonl", [{"prompt": text} for text in WRITTEN])
    recipe = tmp_path / "recipe.yaml"
    content = {
        "model": {"name": "somewhere"},
        "data": {"path": rows, "eval_path": mine},
        "rewards": [{"name": "math"}],
        "training": {"output_dir": "unused"},
    }
    recipe.write_text(yaml.safe_dump(content))
    assert decontaminate(rows, [str(recipe)], tmp_path / "clean.jsonl")["kept"] == 300


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "decontaminate", *arguments])
    return result.exit_code, result.output


def test_the_command_takes_several_evaluations(rows: str, suite: str, tmp_path: Path) -> None:
    more = write(tmp_path / "more.jsonl", [{"question": from_templates(1)[0]}])
    code, said = run(rows, "--against", suite, more)
    assert code == 0, said
    assert "3 of 302 rows repeat one of 31 questions" in said
    assert len(read(tmp_path / "rows.clean.jsonl")) == 299


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--against EVALUATION: name at least one"),
        (["--against", "no_such_suite"], "--against no_such_suite: neither a file of rows, a suite nor a recipe"),
        (["--against", "nowhere.jsonl"], "--against: nowhere.jsonl: no such file"),
        (["--against", "{suite}", "--output", "{rows}"], "is what the rows are read from"),
        (["--against", "{suite}", "--output", "rows.csv"], "rows go into a file that ends in .jsonl"),
        (["--against", "{suite}", "--column", "text"], "column 'text' is missing"),
    ],
)
def test_mistakes(rows: str, suite: str, arguments: list[str], message: str) -> None:
    code, said = run(rows, *(given.format(rows=rows, suite=suite) for given in arguments))
    assert code == 2
    assert message in said


def test_nothing_left_says_so(suite: str, tmp_path: Path) -> None:
    code, said = run(suite, "--against", suite, "--output", str(tmp_path / "none.jsonl"))
    assert code == 1
    assert "every row" in said
