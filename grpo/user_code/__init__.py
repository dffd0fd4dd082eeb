"""The user's own code, named by its place: ``file.py:name`` or ``package.module:name``. Standard library only.

Rewards, losses, tasks and backends all come through here, so that their mistakes are reported in the same words.
``imports.py`` defines what their imports mean. Others take what ``__all__`` lists; a process that runs our packages
calls ``import_ours`` first.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo.errors import Preempted, RunError, UserError
from grpo.user_code.imports import MARK, import_ours, import_user_module, in_plain_names
from grpo.user_code.sources import sources

__all__ = [
    "Calls",
    "as_number",
    "brief",
    "file_of",
    "import_ours",
    "is_place",
    "load",
    "load_module",
    "must_take",
    "sources_of",
    "split_place",
    "stopped_at",
    "traceback_of",
]


def is_place(text: str) -> bool:
    """Whether ``text`` names the user's own code rather than something of ours: it has a colon."""
    return ":" in text


def split_place(place: str, key: str = "") -> tuple[str, str]:
    """The module or file, and the name in it. Raises UserError, with the recipe's ``key`` in front."""
    module, _, name = place.rpartition(":")
    if not module or not name.isidentifier():
        raise UserError(f"{_of(key)}expected file.py:name or package.module:name, got {place!r}")
    return module, name


def file_of(where: str, key: str = "") -> Path | None:
    """The absolute path of the file ``where``; None for a dotted name. Raises UserError where there is no such file."""
    if not where.endswith(".py") and "/" not in where:
        return None
    file = Path(where).expanduser().resolve()
    if file.is_file():
        return file
    near = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.py")], n=1)
    raise UserError(f"{_of(key)}there is no file {file}" + (f"; did you mean {near[0]}?" if near else ""))


def load(place: str, key: str = "") -> Any:
    """What ``file.py:name`` or ``package.module:name`` names.

    The file can import what lies beside it or in the working directory. Raises UserError, with the recipe's ``key`` in
    front: there is no such file, it does not import (with file, line and cause), or it has no such name (with the
    nearest one).
    """
    where, name = split_place(place, key)
    module = load_module(where, key)
    try:
        return getattr(module, name)
    except AttributeError:
        raise UserError(f"{_of(key)}{where} has no {name!r}{_instead(module, name)}") from None


def load_module(where: str, key: str = "") -> ModuleType:
    """The module of a file or of a dotted name. Raises UserError as ``load`` does."""
    file = file_of(where, key)
    try:
        return import_user_module(where, file.parent if file else Path.cwd().resolve(), file)
    except (KeyboardInterrupt, Preempted):
        raise
    except BaseException as why:  # a user's module may do anything, SystemExit included
        raise UserError(f"{_of(key)}{stopped_at(why)}") from why


def sources_of(place: str, key: str = "") -> dict[str, Path]:
    """The files of the user's that ``place`` consists of, by their names: its own, and those that it imports.

    Raises UserError where ``place`` or the file that it names is none.
    """
    where, _ = split_place(place, key)
    return sources(where, file_of(where, key))


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
    """One line: file and line at which an exception stopped the user's code (or any code, if none of the user's ran),
    and the exception."""
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
    """Whether a file belongs to the machinery of imports, Python's or ours, rather than to what was imported."""
    return "importlib" in filename or Path(filename).parent == Path(__file__).parent


MAX_TRACEBACK = 4000


def traceback_of(why: BaseException, ours: str) -> str:
    """The end of an exception's traceback, from the user's code on: without the first frames, of files in the folder
    ``ours``."""
    frames = why.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(ours):
        frames = frames.tb_next
    try:
        text = "".join(traceback.format_exception(type(why), why, frames, limit=-20))
    except Exception as again:  # an exception of the user's own may break even this
        text = f"{type(why).__name__} (its traceback cannot be shown: {type(again).__name__})"
    return text[-MAX_TRACEBACK:]


def as_number(value: Any) -> float | None:
    """A float from what counts as a number: an int, float or bool, an array's scalar, a tensor of one element. None
    from anything else."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            value = value.item()
    if not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


class Calls:
    """Calls of a user's function. An error in one is reported in one line that begins with ``what``.

    At the first call it counts as a mistake in the code: UserError. Later it depends on the data, and may happen on one
    process only: RunError.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.first = True

    def error(self, text: str) -> UserError | RunError:
        """The error to raise for a wrong result."""
        return (UserError if self.first else RunError)(f"{self.what}: {text}")

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around a call and the checks of its result. An exception becomes an ``error`` with its text and the user's
        line that raised it. UserError and RunError pass unchanged, and so does running out of memory, which the trainer
        may handle."""
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
    """Raise UserError, beginning with ``what``, where ``function`` cannot be called with as many ``arguments``."""
    if not callable(function):
        raise UserError(f"{what} is {brief(function)}; expected a function of ({', '.join(arguments)})")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some C functions have none
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise UserError(f"{what} takes {signature}; it is called with ({', '.join(arguments)})") from None


def brief(value: Any) -> str:
    """A value's type, and its text cut to 60 characters."""
    if value is None:
        return "None"
    text, kind = " ".join(repr(value).split()), type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}: {text if len(text) <= 60 else text[:57] + '...'}"
