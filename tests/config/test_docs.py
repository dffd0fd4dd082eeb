"""Documentation that is made from code is what the code makes now."""

from __future__ import annotations

from pathlib import Path

from grpo.config.docs import EXAMPLE, recipe_markdown
from grpo.config.hints import sections
from grpo.config.load import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_recipe_page_is_the_schema():
    assert PAGE.read_text(encoding="utf-8") == recipe_markdown(), "python -m grpo.config.docs > docs/recipe.md"


def test_every_key_has_a_meaning():
    unexplained = [
        f"{name}.{key}"
        for name, section in sections().items()
        for key, field in section.model_fields.items()
        if not field.description
    ]
    assert not unexplained


def test_example_is_a_recipe(tmp_path):
    file = tmp_path / "example.yaml"
    file.write_text(EXAMPLE, encoding="utf-8")
    assert load_recipe(file).rollout.num_generations == 8
