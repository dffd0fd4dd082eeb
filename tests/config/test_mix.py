"""`data.mix` in a recipe: what a source may say, whose reward is whose, and mistakes in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.config import Recipe
from grpo.config.load import dump_given, dump_recipe, load_recipe
from grpo.errors import UserError

RECIPE: dict[str, Any] = {
    "model": {"name": "somewhere"},
    "data": {
        "mix": [
            {"name": "countdown", "weight": 2, "template": "r1_zero", "rewards": [{"name": "countdown"}]},
            {
                "path": "gsm8k.jsonl",
                "label": "school",
                "rewards": [{"name": "math"}, {"name": "format", "weight": 0.1}],
            },
            {"hub": "owner/data.set", "rewards": [{"name": "math"}, {"name": "math", "weight": 0.5}]},
        ]
    },
    "rewards": [{"name": "language", "weight": 0.1}],
    "training": {"output_dir": "unused"},
}


def changed(**sections: Any) -> dict[str, Any]:
    return {**RECIPE, **sections}


def load(folder: Path, content: dict[str, Any], *overrides: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe(file, overrides)


def test_sources_and_their_rewards() -> None:
    recipe = Recipe.model_validate(RECIPE)
    assert [source.label for source in recipe.data.sources()] == ["countdown", "school", "data.set"]
    assert recipe.reward_names() == ["language", "countdown", "math", "format", "math#2"]
    scored = {
        source.label: [
            name
            for name, reward in zip(recipe.reward_names(), recipe.functions(), strict=True)
            if reward.scores(source.label)
        ]
        for source in recipe.data.sources()
    }
    assert scored == {
        "countdown": ["language", "countdown"],
        "school": ["language", "math", "format"],
        "data.set": ["language", "math", "math#2"],
    }
    places = [reward.where(i) for i, reward in enumerate(recipe.functions())]
    assert places[:3] == ["rewards[0]", "data.mix[0].rewards[0]", "data.mix[1].rewards[0]"]
    assert [recipe.judged_by(label) for label in scored] == ["countdown", "math", "math"]
    assert recipe.data.held_out() == 3 * 256


def test_evaluation_reward_judges_the_sources_that_it_scores() -> None:
    recipe = Recipe.model_validate(changed(evaluation={"reward": "format"}))
    assert [recipe.judged_by(source.label) for source in recipe.data.sources()] == ["countdown", "format", "math"]


def test_one_source_is_as_before() -> None:
    recipe = Recipe.model_validate(changed(data={"name": "countdown"}, rewards=[{"name": "countdown"}]))
    (source,) = recipe.data.sources()
    assert (source.label, source.where, source.rows) == ("", "data", recipe.data)
    assert recipe.functions() == recipe.rewards
    assert recipe.judged_by() == "countdown"


def test_what_is_dumped_loads_back(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE, "data.mix.0.weight=3", "data.mix.1.rewards.1.weight=0.2")
    assert (recipe.data.mix[0].weight, recipe.data.mix[1].rewards[1].weight) == (3, 0.2)
    for text in (dump_recipe(recipe), dump_given(recipe)):
        file = tmp_path / "again.yaml"
        file.write_text(text)
        assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        ({"name": "countdown"}, [], "data: name is said by each source of mix"),
        ({"template": "chat"}, [], "data: template is said by each source of mix"),
        ({}, ["data.mix.1.label=countdown"], "two sources of mix are called countdown: give them a label each"),
        ({}, ["data.mix.1.label=a/b"], "data.mix.1.label"),
        ({}, ["data.mix.0.path=x.jsonl"], "data.mix.0: give exactly one of name, path, hub (given: name, path)"),
        ({}, ["data.mix.0.weight=0"], "must be above 0"),
        ({}, ["data.mix.0.tempalte=chat"], "did you mean template?"),
        ({}, ["data.mix.0.rewards.0.wieght=1"], "did you mean weight?"),
        ({}, ["data.mix.0.max_prompt_length=9"], "`max_prompt_length` is `data.max_prompt_length` here"),
        ({}, ["data.mix.0.rewards=[]", "rewards=[]"], "data.mix[0].rewards (countdown): a grpo recipe needs at least"),
        ({}, ["data.mix.0.rewards.0.weight=0", "rewards=[]"], "data.mix[0].rewards (countdown): every weight is 0"),
        ({}, ["evaluation.reward=gsm8k"], "gsm8k is not one of rewards (language, countdown, math, format, math#2)"),
    ],
)
def test_mistakes(tmp_path: Path, data: dict, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, changed(data=RECIPE["data"] | data), *overrides)
    assert message in str(error.value), str(error.value)
    assert len(str(error.value).splitlines()) == 1, str(error.value)
