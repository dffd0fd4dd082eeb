"""The list of built-in rewards is what is there."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import rewards


def test_every_module_with_a_reward_of_its_name_is_listed_and_no_other():
    names = [module.name for module in pkgutil.iter_modules(rewards.__path__)]
    found = [name for name in names if hasattr(import_module(f"rewards.{name}"), f"{name}_reward")]
    assert tuple(sorted(found)) == rewards.REWARDS
