"""Code of the user's own by its place: ``file.py:name`` or ``package.module:name``. Standard library only.

Rewards, losses, tasks and backends all come through here, so that their mistakes are told in the same words.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo.errors import UserError


def is_place(text: str) -> bool:
    """Whether ``text`` names code of the user's own rather than something of ours: it has a colon."""
    return ":" in text


def split_place(place: str, key: str) -> tuple[str, str]:
    """The module or file, and the name in it. Raises UserError, with the recipe's ``key`` in front."""
    module, _, name = place.rpartition(":")
    if not module or not name.isidentifier():
        raise UserError(f"{key}: expected file.py:name or package.module:name, got {place!r}")
    return module, name


def load(place: str, key: str) -> Any:
    """What ``file.py:name`` or ``package.module:name`` names.

    A file's neighbours can be imported from it. Raises UserError, with the recipe's ``key`` in front: there is no such
    file, it does not import (with file, line and cause), or it has no such name (with the nearest one).
    """
    where, name = split_place(place, key)
    module = load_module(where, key)
    try:
        return getattr(module, name)
    except AttributeError:
        raise UserError(f"{key}: {where} has no {name!r}{_instead(module, name)}") from None


def load_module(where: str, key: str) -> ModuleType:
    """The module of a file's path or of a dotted name. Raises UserError as ``load`` does."""
    file = file_of(where)
    if file is not None and not file.is_file():
        raise UserError(f"{key}: there is no file {file}")
    try:
        return _module_of(file) if file is not None else importlib.import_module(where)
    except BaseException as why:  # a user's module may do anything, SystemExit included
        raise UserError(f"{key}: {why_not_imported(why, file)}") from why


def file_of(where: str) -> Path | None:
    """The file that ``where`` means, absolute; None where it is a dotted name."""
    return Path(where).expanduser().resolve() if where.endswith(".py") or "/" in where else None


def _module_of(file: Path) -> ModuleType:
    """Execute a file as a module, once a process, under a name that no other module has."""
    name = f"_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # its neighbours can be imported, and shadow nothing
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _instead(module: ModuleType, name: str) -> str:
    """The nearest name that the module defines, or all of them."""
    names = [n for n, value in vars(module).items() if not n.startswith("_") and not isinstance(value, ModuleType)]
    own = [n for n in names if getattr(vars(module)[n], "__module__", None) == module.__name__] or names
    if near := difflib.get_close_matches(name, own, n=1):
        return f"; did you mean {near[0]}?"
    return f" (it has: {', '.join(own) or 'nothing'})"


def why_not_imported(why: BaseException, file: Path | None) -> str:
    """One line: where in the user's file (or, failing that, anywhere) the import stopped, and what it was."""
    what = "".join(traceback.format_exception_only(type(why), why)).strip().splitlines()[-1]
    if isinstance(why, MemoryError) or re.search("failed to map|annot allocate memory", what):
        what += " (raise scoring.memory_limit_gb, or set it to null)"
    if isinstance(why, SyntaxError):
        return f"{why.filename}:{why.lineno}: {what}"
    frames = [frame for frame in traceback.extract_tb(why.__traceback__) if "importlib" not in frame.filename]
    frames = [f for f in frames if f.filename == str(file)] or [f for f in frames if f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {what}" if frames else what
