"""What RECIPE means: a file of one's own, or else a recipe that grpo ships, whatever the working directory is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from grpo.config.find import SHIPPED, find_recipe, shipped_recipe, shipped_recipes
from grpo.config.load import load_recipe
from grpo.errors import UserError


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="grpo")
    return lambda: caplog.messages


def refusal(given: str) -> str:
    with pytest.raises(UserError) as caught:
        find_recipe(given)
    return str(caught.value)


@pytest.mark.parametrize("form", ["{}", "{}.yaml", "recipes/{}", "recipes/{}.yaml"])
@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_found_from_anywhere(name, form, said):
    assert find_recipe(form.format(name)) == shipped_recipe(form.format(name)) == SHIPPED / f"{name}.yaml"
    assert not said()


@pytest.mark.parametrize("given", ["smoke_cpu", "smoke_cpu.yaml"])
def test_a_file_wins_over_a_name_and_it_is_said(given, said):
    Path("smoke_cpu.yaml").write_text((SHIPPED / "demo_cpu.yaml").read_text())
    assert load_recipe(given) == load_recipe("demo_cpu")
    assert said() == ["smoke_cpu.yaml is taken, not the recipe of that name that grpo ships"]


def test_a_file_in_a_folder_recipes_wins_too(said):
    Path("recipes").mkdir()
    Path("recipes/smoke_cpu.yaml").touch()
    assert find_recipe("recipes/smoke_cpu") == Path("recipes/smoke_cpu.yaml")
    assert said() == ["recipes/smoke_cpu.yaml is taken, not the recipe of that name that grpo ships"]
    assert find_recipe("smoke_cpu") == SHIPPED / "smoke_cpu.yaml"


def test_nothing_is_said_where_both_are_the_same_file(said, monkeypatch):
    monkeypatch.chdir(SHIPPED.parent)
    assert find_recipe("recipes/smoke_cpu.yaml").samefile(find_recipe("smoke_cpu"))
    assert not said()


def test_a_name_in_another_folder_is_not_a_shipped_one():
    assert refusal("mine/smoke_cpu.yaml") == "mine/smoke_cpu.yaml: no such file"


def test_ones_own_file_is_found_without_its_ending():
    Path("mine").mkdir()
    Path("mine/first.yaml").touch()
    assert find_recipe("mine/first") == Path("mine/first.yaml")


def test_a_folder_of_that_name_is_no_recipe(said):
    Path("smoke_cpu").mkdir()
    assert find_recipe("smoke_cpu") == SHIPPED / "smoke_cpu.yaml"
    assert said() == ["smoke_cpu is a folder here; the recipe of that name that grpo ships is taken"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("recpie.yaml", "recpie.yaml: no such file or recipe, did you mean recipe.yaml?"),
        ("run/recpie.yaml", "run/recpie.yaml: no such file, did you mean run/recipe.yaml?"),
        ("smok_cpu", "smok_cpu: no such file or recipe, did you mean smoke_cpu?"),
        ("recipes/Demo-CPU.yaml", "recipes/Demo-CPU.yaml: no such file or recipe, did you mean demo_cpu?"),
        ("gsm8k", "gsm8k: no such file or recipe, did you mean gsm8k_qwen2.5-0.5b or gsm8k_qwen2.5-0.5b_lora or "
         "gsm8k_qwen2.5-1.5b?"),
        ("countdown_qwen2.5-05b", "countdown_qwen2.5-05b: no such file or recipe, did you mean "
         "countdown_qwen2.5-0.5b?"),
        ("zzz.yaml", "zzz.yaml: no such file or recipe; `grpo recipes` lists those that grpo ships"),
        ("x/y/zzz.yaml", "x/y/zzz.yaml: no such file"),
        ("loop.yaml", "loop.yaml: no such file or recipe; `grpo recipes` lists those that grpo ships"),
        ("empty", "empty: is a folder; a recipe is a file"),
        ("run", "run: is a folder; its recipe is run/recipe.yaml"),
        ("rollout.top_k=1", "rollout.top_k=1: no recipe given, only an override; the recipe comes first"),
        ("x" * 300, "x" * 300 + ": cannot be read: File name too long"),
    ],
)  # fmt: skip
def test_a_wrong_one_gets_the_nearest(given, message):
    Path("run").mkdir()
    Path("empty").mkdir()
    for file in ("recipe.yaml", "run/recipe.yaml"):
        Path(file).touch()
    Path("loop.yaml").symlink_to("loop.yaml")
    assert refusal(given) == message


def test_a_recipe_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").touch()
    assert find_recipe("~/mine.yaml") == tmp_path / "mine.yaml"
