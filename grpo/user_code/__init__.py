"""Code of the user's own by its place: ``file.py:name`` or ``package.module:name``. Standard library only.

Rewards, losses, tasks and backends all come through here, so that their mistakes are told in the same words.
``imports.py`` says what their imports mean. Others take what ``__all__`` lists; of a process that runs our packages,
``import_ours`` is the first call.
"""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo.errors import RunError, UserError
from grpo.user_code.imports import MARK, import_ours, import_user_module, in_plain_names

__all__ = [
    "Calls",
    "brief",
    "file_of",
    "import_ours",
    "is_place",
    "load",
    "load_module",
    "must_take",
    "split_place",
    "stopped_at",
]


def is_place(text: str) -> bool:
    """Whether ``text`` names code of the user's own rather than something of ours: it has a colon."""
    return ":" in text


def split_place(place: str, key: str = "") -> tuple[str, str]:
    """The module or file, and the name in it. Raises UserError, with the recipe's ``key`` in front."""
    module, _, name = place.rpartition(":")
    if not module or not name.isidentifier():
        raise UserError(f"{_of(key)}expected file.py:name or package.module:name, got {place!r}")
    return module, name


def file_of(where: str, key: str = "") -> Path | None:
    """The file that ``where`` means, absolute; None where it is a dotted name. Raises UserError where there is none."""
    if not where.endswith(".py") and "/" not in where:
        return None
    file = Path(where).expanduser().resolve()
    if file.is_file():
        return file
    near = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.py")], n=1)
    raise UserError(f"{_of(key)}there is no file {file}" + (f"; did you mean {near[0]}?" if near else ""))


def load(place: str, key: str = "") -> Any:
    """What ``file.py:name`` or ``package.module:name`` names.

    What lies beside the file, or in the working directory, can be imported from it. Raises UserError, with the recipe's
    ``key`` in front: there is no such file, it does not import (with file, line and cause), or it has no such name
    (with the nearest one).
    """
    where, name = split_place(place, key)
    module = load_module(where, key)
    try:
        return getattr(module, name)
    except AttributeError:
        raise UserError(f"{_of(key)}{where} has no {name!r}{_instead(module, name)}") from None


def load_module(where: str, key: str = "") -> ModuleType:
    """The module of a file's path or of a dotted name. Raises UserError as ``load`` does."""
    file = file_of(where, key)
    try:
        return import_user_module(where, file.parent if file else Path.cwd().resolve(), file)
    except KeyboardInterrupt:
        raise
    except BaseException as why:  # a user's module may do anything, SystemExit included
        raise UserError(f"{_of(key)}{stopped_at(why)}") from why


def _of(key: str) -> str:
    return f"{key}: " if key else ""


def _instead(module: ModuleType, name: str) -> str:
    """The nearest name that the module defines, or all of them."""
    names = [n for n, value in vars(module).items() if not n.startswith("_") and not isinstance(value, ModuleType)]
    own = [n for n in names if getattr(vars(module)[n], "__module__", None) == module.__name__] or names
    if near := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean {near[0]}?"
    return f" (it has: {', '.join(own) or 'nothing'})"


def stopped_at(why: BaseException) -> str:
    """One line: where in the user's code an exception came about (the last line of it that was run, or else the last of
    any), and what it is."""
    lines = "".join(traceback.format_exception_only(type(why), why)).strip().splitlines()
    what = in_plain_names(lines[-1] if isinstance(why, SyntaxError) else lines[0])
    if isinstance(why, SyntaxError) and why.filename and Path(why.filename).is_file():
        return f"{why.filename}:{why.lineno}: {what}"
    frames = [
        (frame.f_code.co_filename, line, frame.f_builtins) for frame, line in traceback.walk_tb(why.__traceback__)
    ]
    own = [frame for frame in frames if MARK in frame[2]]
    shown = own or [frame for frame in frames if not _is_machinery(frame[0])]
    return f"{shown[-1][0]}:{shown[-1][1]}: {what}" if shown else what


def _is_machinery(filename: str) -> bool:
    """Whether a line in there says how something was imported, rather than what."""
    return "importlib" in filename or Path(filename).parent == Path(__file__).parent


class Calls:
    """Calls of a function of the user's own. What goes wrong in them is told in one line that begins with ``what``.

    At the first call it is a mistake in the code: UserError. Later it depends on the data, and may be so on one process
    alone: RunError.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.first = True

    def error(self, text: str) -> UserError | RunError:
        """The error to raise where what it returned is wrong."""
        return (UserError if self.first else RunError)(f"{self.what}: {text}")

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call and the checks of its result. An exception is told by its text and the user's line that raised
        it. Running out of memory passes: the trainer may know what to do. So do errors that are for people already."""
        try:
            yield
        except (UserError, RunError):
            raise
        except Exception as why:
            if isinstance(why, MemoryError) or (
                isinstance(why, RuntimeError) and re.search("memory|bad_alloc", str(why))
            ):
                raise
            raise self.error(stopped_at(why)) from why
        self.first = False


def must_take(function: Callable[..., Any], arguments: tuple[str, ...], what: str) -> None:
    """Raise UserError, beginning with ``what``, where a function cannot be called with so many arguments."""
    if not callable(function):
        raise UserError(f"{what} is {brief(function)}; expected a function of ({', '.join(arguments)})")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions of C have none
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise UserError(f"{what} takes {signature}; it is called with ({', '.join(arguments)})") from None


def brief(value: Any) -> str:
    """A value by its type and, as far as it is short, its text."""
    text = " ".join(repr(value).split())
    return "None" if value is None else f"a {type(value).__name__}: {text if len(text) <= 60 else text[:57] + '...'}"
