"""The table of suites: every entry whole, pinned, with its source; and the files of a user's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grpo.config.load import load_recipe, recipe_of
from grpo.config.suites import find_suite, suites
from grpo.config.suites_table import table
from grpo.errors import UserError
from tests.launching import ROOT

OF_THE_FIELD = [
    *("math500", "aime24", "aime25", "amc23", "gsm8k", "minerva", "olympiad", "gpqa"),
    *("humaneval", "mbpp", "livecodebench"),
]
OWN = """\
title: Sums
rows: {path: sums.jsonl}
question: "{prompt} = ?"
reward: {name: math}
"""


def test_every_suite_is_pinned_and_says_where_it_is_from() -> None:
    assert list(suites()) == OF_THE_FIELD
    for suite in suites().values():
        assert re.fullmatch("[0-9a-f]{40}", suite.rows.revision or ""), suite.title
        assert suite.rows.count
        assert suite.rows.hub
        assert "arXiv:" in suite.source or "github.com/" in suite.source
        assert suite.about


def test_the_page_shows_the_table() -> None:
    assert table() in (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "sums.yaml").write_text(OWN)
    suite = find_suite(str(tmp_path / "sums.yaml"))
    assert (suite.form, suite.sampling.temperature, suite.sampling.num_generations) == ("rows", 0.0, 1)


def test_the_example_is_one() -> None:
    assert find_suite(str(ROOT / "examples/my_suite.yaml")).rows.task == "reasoning_gym"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (OWN.replace("title: Sums\n", ""), r"sums.yaml:1: title: Field required"),
        (OWN.replace("name: math", "name: math, wieght: 2"), r"sums.yaml:4: reward.wieght: Extra inputs"),
        (OWN.replace("path: sums", "hub: a/b, path: sums"), r"sums.yaml:2: rows: give exactly one of hub, path"),
        (OWN + "sampling: {num_generations: 4}\n", r"sums.yaml:1: sampling: temperature 0 is greedy"),
        (OWN + "form: maths\n", r"sums.yaml:5: form: Input should be 'rows', 'math'"),
        ("- 1\n", "a suite is a mapping"),
        ("a: [\n", r"sums.yaml:\d: "),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_told_with_their_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "sums.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        find_suite(str(tmp_path / "sums.yaml"))


def test_a_name_that_nothing_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no suite 'math50', did you mean math500\? there are math500, aime24, "):
        find_suite("math50")
    with pytest.raises(UserError, match=r"nothing.yaml: cannot be read: No such file"):
        find_suite(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        ("suites: [math50]", "recipe.yaml:5: evaluation.*suites: no suite 'math50', did you mean math500"),
        ("suites: [aime24, aime24]", "aime24 is there twice"),
        ("suites: [aime24], suites_every: 30", "must be a multiple of training.eval_every"),
        ("suites_every: 50", "there are no suites to evaluate"),
        ("suites: [aime24], suite_sampling: {temperature: 0.0, num_generations: 4}", "temperature 0 is greedy"),
        ("suites: [aime24], suite_sampling: {n: 4}", "unknown key"),
    ],
)
def test_a_recipe_s_suites_are_checked_with_it(tmp_path: Path, evaluation: str, says: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = "model: {name: m}\ndata: {name: countdown}\nrewards: [{name: countdown}]\ntraining: {output_dir: run}\n"
    recipe.write_text(f"{text}evaluation: {{{evaluation}}}\n")
    with pytest.raises(UserError, match=says):
        load_recipe(recipe)


def test_stage_sft_refuses_suites_and_says_what_to_do() -> None:
    value = {"stage": "sft", "model": {"name": "m"}, "data": {"name": "traces"}, "training": {"output_dir": "run"}}
    with pytest.raises(UserError, match="grpo eval run --suite gsm8k"):
        recipe_of(value | {"evaluation": {"suites": ["gsm8k"]}}, "test")
