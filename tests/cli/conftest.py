"""What the tests of the commands share: a folder with a recipe in it, and ways to run a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import grpo
from grpo.cli.main import app

ROOT = Path(__file__).parents[2]
RECIPE = """\
model: {name: some/model}
data: {name: countdown}
rewards: [{name: countdown}]
training: {output_dir: run}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "0")  # so that it is put back, whatever a command sets
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("LOCAL_RANK")
    Path("recipe.yaml").write_text(RECIPE)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module with the given functions in the place of ``grpo.NAME``, which then is not imported."""

    def stand_in(name: str, **functions):
        module = ModuleType(f"grpo.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"grpo.{name}", module)
        if "." not in name:
            monkeypatch.setattr(grpo, name, module, raising=False)

    return stand_in


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def python(
    *arguments: str, cwd: Path | None = None, more: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``more`` variables are set for it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= more or {}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=100
    )
