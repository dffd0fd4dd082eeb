"""What of a run's recipe is not a default, read without checking it: it may be of another version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from grpo.config.hints import section_in
from grpo.config.recipe import Recipe


def given(recipe: dict[str, Any]) -> dict[str, Any]:
    """By dotted key, the values that differ from this version's defaults. A key that this version does not know is
    among them."""
    return dict(_given(recipe, Recipe, ""))


def _given(values: dict[str, Any], section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        field, name = section.model_fields.get(str(key)), f"{prefix}{key}"
        inner = None if field is None else section_in(field)
        if inner is not None and isinstance(value, dict):
            yield from _given(value, inner, f"{name}.")
        elif inner is not None and isinstance(value, list):
            for i, item in enumerate(value):
                yield from _given(item, inner, f"{name}.{i}.") if isinstance(item, dict) else [(f"{name}.{i}", item)]
        elif field is None or field.is_required() or value != field.get_default(call_default_factory=True):
            yield name, value
