"""The list of tasks is what is there."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

import data


def test_every_file_that_builds_rows_is_listed_and_no_other():
    modules = [import_module(f"data.{module.name}") for module in pkgutil.iter_modules(data.__path__)]
    builders = {module.__name__.removeprefix("data."): module.build for module in modules if hasattr(module, "build")}
    assert tuple(sorted(builders)) == data.TASKS
    assert all(
        list(inspect.signature(build).parameters)[:3] == ["split", "size", "seed"] for build in builders.values()
    )
