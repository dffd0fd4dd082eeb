"""The files that the user's code at a place consists of: its own, and those of the user's that it imports.

Read, not run: an import statement anywhere in a file counts, and ``importlib.import_module("name")``; one whose name is
computed does not. Libraries and our own packages are not the user's.
"""

from __future__ import annotations

import ast
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from grpo.user_code.imports import OURS, ROOT


def sources(where: str, file: Path | None) -> dict[str, Path]:
    """The files of the module ``where``, by their places in the folder that it lies in: ``helper.py``, ``pkg/a.py``.

    ``file`` is its file if ``where`` names one; a dotted name is looked for in the working directory and where Python
    finds modules. Empty where there is no such module, or it has no source.
    """
    neighbours = True  # whether what lies beside it is the user's too
    if file is not None:
        folder, todo = file.parent, [file, *_packages_of(file)]
    else:
        top = where.partition(".")[0]
        spec = PathFinder.find_spec(top, [str(Path.cwd())]) or PathFinder.find_spec(top, sys.path)
        locations = list(spec.submodule_search_locations or []) if spec is not None else []
        place = Path(locations[0]) if locations else Path(spec.origin) if spec is not None and spec.origin else None
        if place is None:
            return {}
        folder, todo = place.parent, _files_of(where.split("."), place.parent)
        neighbours = folder.resolve() == Path.cwd().resolve()
    found: dict[Path, None] = {}
    while todo:
        one = todo.pop()
        if one in found or one.suffix != ".py":
            continue
        found[one] = None
        for level, parts in _imports(one):
            if level or neighbours or parts[0] == where.partition(".")[0]:
                todo += _of_the_users(level, parts, one, folder)
    return {_label(one, folder): one for one in sorted(found)}


def _imports(file: Path) -> list[tuple[int, list[str]]]:
    """What a file imports: the level of a relative import (0: absolute) and the parts of a module's name, each with
    the names taken from it, which may be modules too."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    found: list[tuple[int, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            found += [(node.level, [*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and (named := _name_in_call(node)):
            found.append((0, named.split(".")))
    return found


def _name_in_call(call: ast.Call) -> str | None:
    """The module that ``import_module("name")`` or ``__import__("name")`` imports."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    first = call.args[0] if call.args and function in ("import_module", "__import__") else None
    name = first.value if isinstance(first, ast.Constant) else None
    return name if isinstance(name, str) and all(part.isidentifier() for part in name.split(".")) else None


def _packages_of(file: Path) -> list[Path]:
    """The ``__init__.py`` of the packages that a file is in, which are executed before it."""
    found = []
    for folder in file.parents:
        if not (init := folder / "__init__.py").is_file():
            break
        found.append(init)
    return found


def _of_the_users(level: int, parts: list[str], file: Path, folder: Path) -> list[Path]:
    """The files that an import in ``file`` executes, if they are the user's."""
    if level:
        return _files_of(parts, file.parents[level - 1])
    for place in (folder, Path.cwd().resolve()):
        if place == ROOT and parts[0] in (*OURS, "grpo"):
            continue
        if files := _files_of(parts, place):
            return files
    return []


def _files_of(parts: list[str], folder: Path) -> list[Path]:
    """The files that importing ``parts`` from ``folder`` executes: packages on the way and the module. A last part that
    is no module is a name in the one before."""
    files: list[Path] = []
    for part in parts:
        if (module := folder / f"{part}.py").is_file():
            return [*files, module]
        folder /= part
        if not folder.is_dir():
            break
        files += [init for init in [folder / "__init__.py"] if init.is_file()]
    return files


def _label(file: Path, folder: Path) -> str:
    """Its place in the folder, or for one of the working directory its place there."""
    for place in (folder, Path.cwd().resolve()):
        if file.is_relative_to(place):
            return file.relative_to(place).as_posix()
    return file.name
