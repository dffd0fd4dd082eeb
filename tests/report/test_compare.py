"""Runs beside each other: grouped by recipe, means over seeds, an exact test on the prompts they share."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.report.compare import compare, mean_over_seeds, paired, said_of
from grpo.report.compare_page import terminal, write_comparison
from tests.report.made_runs import Page, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds that learned, and two of another recipe that collapsed."""
    folder = tmp_path_factory.mktemp("compared")
    made = [make_run(folder / f"good{s}", steps=4, every=2, tasks=40, seed=s) for s in (0, 1)]
    made += [make_run(folder / f"bad{s}", steps=20, every=10, tasks=40, seed=s, collapsed=True) for s in (0, 1)]
    for run in made[2:]:
        recipe = run / "recipe.yaml"
        recipe.write_text(recipe.read_text() + "optimizer: {learning_rate: 0.1}\n")
        text = recipe.read_text().replace("max_steps: 20", "max_steps: 4")  # so that one key differs
        recipe.write_text(text)
    return made


def test_runs_that_differ_in_their_seed_alone_are_one_side(runs):
    good, bad = compare(runs)
    assert (good.label, bad.label) == ("learning_rate=default (2 seeds)", "learning_rate=0.1 (2 seeds)")
    assert good.means["accuracy before"].value == pytest.approx(0.16)
    assert bad.means["gain"].value == pytest.approx(-0.9)
    after = good.means["accuracy after"]
    assert after.low <= after.value <= after.high


def test_an_interval_over_seeds_is_students(runs):
    found = mean_over_seeds([0.4, 0.5, 0.6])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert mean_over_seeds([0.4]).low is None


def test_the_test_is_paired_on_prompts_that_are_the_same(runs, tmp_path):
    good, bad = compare(runs)
    found = paired(good, bad)
    accuracy = good.means["accuracy after"].value
    solved = [p for p in range(40) if (p * 0.618) % 1 < accuracy]
    worse = len({p % 9 for p in solved})  # of 40 prompts with 9 questions
    assert found is not None
    assert (found.questions, found.better, found.worse) == (9, 0, worse)
    assert found.p == pytest.approx(2 * 0.5**worse)
    assert f"on 0 of 9 shared held-out questions and worse on {worse}: -{len(solved) / 40:.3f} [" in said_of(
        found, "A", "B"
    )
    other = shutil.copytree(runs[2], tmp_path / "other")
    for file in (other / "rollouts").iterdir():
        file.write_text(file.read_text().replace("numbers 6", "numbers 7"))
    assert "share no held-out prompt" in said_of(paired(*compare([runs[0], other])), "A", "B")


def test_the_page_and_the_table(runs, tmp_path):
    lines = write_comparison(runs, tmp_path / "compare.html")
    assert lines[-1] == str(tmp_path / "compare.html")
    assert lines[:2] == ["A  learning_rate=default (2 seeds)", "B  learning_rate=0.1 (2 seeds)"]
    (gain,) = [line for line in lines if line.startswith("gain")]
    assert "-0.900 [-0.900, -0.900]" in gain
    page = Page((tmp_path / "compare.html").read_text())
    pictures = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert pictures == ["Held-out accuracy", "Reward", "Completion length", "Entropy"]
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in page.tags)
    articles = [attributes["class"].split()[0] for tag, attributes in page.tags if tag == "article"]
    assert set(articles) == {"lost", "unsolved"}
    assert page.count("cell") == 2 * len(articles)


def test_seeds_of_one_recipe_have_nothing_to_test(runs):
    assert "These are seeds of one recipe: there is nothing to test." in list(terminal(compare(runs[:2])))


def test_many_sides_fit_80_columns_with_every_figure(runs):
    (one, other) = compare(runs)
    sides = [replace(side, letter=letter) for side, letter in zip([one, other] * 3, "ABCDEF", strict=True)]
    lines = list(terminal(sides))
    assert max(map(len, lines)) <= 80
    for name in ("accuracy after", "gain"):
        figures = [figure for line in lines if line.startswith(name) for figure in re.split(r"  +", line)[1:]]
        assert figures == [side.means[name].text() for side in sides]


def test_one_run_is_no_comparison(runs, tmp_path):
    with pytest.raises(UserError, match="runs inside it: "):
        write_comparison([runs[0].parent], tmp_path / "compare.html")
    with pytest.raises(UserError, match="two run folders or more"):
        write_comparison(runs[:1], tmp_path / "compare.html")
    with pytest.raises(UserError, match="cannot write"):
        write_comparison(runs[:2], tmp_path / "no" / "compare.html")
