"""Which file RECIPE means on a command line: a file, or the name of a recipe that grpo ships; and where a model is.

A file wins over a name. With ``.yaml`` or without, with ``recipes/`` in front or without, a name is the same.
"""

from __future__ import annotations

import difflib
import logging
import os
from pathlib import Path

from grpo.errors import UserError

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"
MOST_GUESSES = 3
LIST_THEM = "; `grpo recipes` lists those that grpo ships"

log = logging.getLogger(__name__)


def locate(name: str) -> str:
    """A model's ``name``, or, if the working directory lacks one that ships with grpo (``data/tiny_base``), its path
    there; with ``~`` as the home folder."""
    name = os.path.expanduser(name)
    shipped = Path(__file__).parents[2] / name
    return str(shipped) if not Path(name).exists() and name.startswith("data/") and shipped.exists() else name


def shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe's file by its name (``smoke_cpu``), in order."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def shipped_recipe(name: str) -> Path:
    """The file of a shipped recipe; UserError with the nearest name if there is none."""
    if file := _shipped(Path(name)):
        return file
    guess = _guess(_stem(Path(name)), {name: name for name in shipped_recipes()})
    raise UserError(f"{name}: no such recipe{guess or LIST_THEM}")


def find_recipe(given: str | Path) -> Path:
    """The file that ``given`` means; UserError if there is none, with the nearest that does exist."""
    if not str(given):
        raise UserError("a recipe's name is empty")
    path = Path(given).expanduser()
    try:
        local = next((file for file in (path, Path(f"{path}.yaml")) if file.exists() and not file.is_dir()), None)
        shipped = _shipped(path)
        if local:
            if shipped and not local.samefile(shipped):
                log.info("%s is taken, not the recipe of that name that grpo ships", local)
            return local
        if shipped:
            if path.is_dir():
                log.info("%s is a folder here; the recipe of that name that grpo ships is taken", path)
            return shipped
        if path.is_dir():
            own = path / "recipe.yaml"
            raise UserError(f"{path}: is a folder; {f'its recipe is {own}' if own.exists() else 'a recipe is a file'}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if "=" in path.name:
        raise UserError(f"{path}: no recipe given, only an override; the recipe comes first")
    files = {file.stem: str(file) for file in path.parent.glob("*.y*ml") if os.path.isfile(file)}
    if not _is_name(path):
        raise UserError(f"{path}: no such file{_guess(_stem(path), files)}")
    guess = _guess(_stem(path), {name: name for name in shipped_recipes()} | files)
    raise UserError(f"{path}: no such file or recipe{guess or LIST_THEM}")


def _is_name(path: Path) -> bool:
    return path.parent in (Path(), Path("recipes"))


def _stem(path: Path) -> str:
    return path.name.removesuffix(".yaml").removesuffix(".yml")


def _shipped(path: Path) -> Path | None:
    return shipped_recipes().get(_stem(path)) if _is_name(path) else None


def _guess(typed: str, known: dict[str, str]) -> str:
    """``, did you mean …?``: what begins with ``typed``, else what is spelt most like it; nothing if nothing is."""
    by_spelling = {name.lower(): meant for name, meant in known.items()}
    begin_so = [name for name in by_spelling if len(typed) > 2 and name.startswith(typed.lower())]
    near = begin_so[:MOST_GUESSES] or difflib.get_close_matches(typed.lower(), by_spelling, n=1)
    return f", did you mean {' or '.join(by_spelling[name] for name in near)}?" if near else ""
