"""The list of tasks is what is there."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from importlib import import_module, reload

import pytest

import data


def test_every_file_that_builds_rows_is_listed_and_no_other():
    modules = [import_module(f"data.{module.name}") for module in pkgutil.iter_modules(data.__path__)]
    builders = {module.__name__.removeprefix("data."): module.build for module in modules if hasattr(module, "build")}
    assert tuple(sorted(builders)) == data.TASKS
    assert all(
        list(inspect.signature(build).parameters)[:3] == ["split", "size", "seed"] for build in builders.values()
    )


@pytest.mark.parametrize("task", [task for task in data.TASKS if hasattr(import_module(f"data.{task}"), "rows")])
def test_rows_of_a_generated_task_need_no_datasets_and_are_those_of_its_builder(task, monkeypatch):
    module = import_module(f"data.{task}")
    built = module.build("train", 3, 5).to_list()
    assert module.build.__doc__ == module.rows.__doc__
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert reload(module).rows("train", 3, 5) == built
    with pytest.raises(ImportError):
        module.build("train", 3, 5)
