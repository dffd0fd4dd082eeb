"""The rooms of ``grpo/`` as docs/architecture.md tells them: few entries, and doors that say what they let out."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from tests.launching import ROOT

HOUSE = ROOT / "grpo"
ROOMS = sorted(init.parent for init in HOUSE.rglob("__init__.py") if init.parent != HOUSE)


def room_of(module: str) -> str:
    """The innermost folder that a module of grpo lies in, as a dotted name."""
    parts = module.split(".")
    while not (ROOT / Path(*parts)).is_dir():
        parts.pop()
    return ".".join(parts)


def taken_from_outside() -> dict[str, set[str]]:
    """By room, its modules that files outside of it import."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in HOUSE.rglob("*.py"):
        importer = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("grpo"):
                continue
            for alias in node.names:
                module = f"{node.module}.{alias.name}"  # of a package, the name may be a module's
                if not (ROOT / Path(*module.split("."))).with_suffix(".py").exists():
                    module = str(node.module)
                room = room_of(module)
                if room not in ("grpo", module) and not importer.startswith(f"{room}."):
                    found[room].add(module.rpartition(".")[2])
    return found


def test_few_entries() -> None:
    assert len([entry for entry in HOUSE.iterdir() if entry.name != "__pycache__"]) <= 30


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.relative_to(ROOT).as_posix())
def test_a_door_says_what_it_lets_out(room: Path) -> None:
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    assert len(docstring.splitlines()) >= 2, "what the room is for, and what others take from it"
    name = ".".join(room.relative_to(ROOT).parts)
    missing = {module for module in taken_from_outside()[name] if f"``{module}" not in docstring}
    assert not missing, f"{name}/__init__.py does not say that others take {', '.join(sorted(missing))}"
