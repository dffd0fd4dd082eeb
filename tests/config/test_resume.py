"""Every key of the recipe is sorted: free on resume, with a warning, or refused."""

from __future__ import annotations

import pytest

from grpo.config.hints import sections
from grpo.config.resume import MEANINGS, TABLES, on_resume


def test_every_key_is_sorted_once() -> None:
    keys = {f"{name}.{key}".lstrip(".") for name, section in sections().items() for key in section.model_fields}
    assert MEANINGS.keys() == keys, "put a new key into one of the tables of grpo/config/resume.py"
    assert sum(len(names.split()) for table in TABLES.values() for names in table.values()) == len(keys)


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("rewards.3.timeout", "free"),
        ("rewards.3.weight", "refused"),
        ("rewards.1", "refused"),
        ("rollout.vllm_server_base_url.0", "free"),
        ("rollout.stop.2", "refused"),
        ("data.args.seed", "refused"),
        ("model.lora.r", "refused"),
        ("optimizer.learning_rate", "warns"),
        ("expect.0", "free"),  # a band that a recipe got since
        ("rollout.overlap", "refused"),  # a key that is gone
    ],
)
def test_keys_inside_a_value_mean_what_it_means(key: str, meaning: str) -> None:
    assert on_resume(key) == meaning
