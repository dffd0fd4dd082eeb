"""The sandboxes of the code reward: one for programs, one for the tests that judge them, for each set of packages."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from typing import Any

from rewards.sandbox import Sandbox, probed_sandbox
from rewards.sandbox.nursery import Nursery
from rewards.sandbox.packages import find_packages

Packages = tuple[str, ...]

lock = threading.Lock()
opened: dict[Hashable, Sandbox] = {}
settings: dict[str, Any] = {"workers": os.cpu_count() or 1, "allow_unsafe": False}
prepared: tuple[str, Nursery | None] | None = None  # the level that holds here, where ``prepare`` has found it


def start(workers: int | None = None, *, allow_unsafe: bool = False, packages: Packages = ()) -> None:
    """Start the workers, if they are not running.

    Raises:
        SandboxUnavailable: see ``rewards.sandbox.Sandbox``.
        PackageRefused: there is no such package, or it cannot be imported in the sandbox.
    """
    with lock:
        if not opened:
            settings.update(workers=workers or os.cpu_count() or 1, allow_unsafe=allow_unsafe)
    programs_of(packages)


def prepare(*, allow_unsafe: bool = False, packages: Packages = ()) -> None:
    """Find out what holds here, for processes that will be forked from this one and call ``start``: each of theirs then
    takes a fifth of the time.

    Raises: as ``start``.
    """
    global prepared
    with probed_sandbox(1, allow_unsafe=allow_unsafe, packages=packages) as sandbox:
        level = sandbox.level
    prepared = level, None if level == "bubblewrap" else Nursery()  # bubblewrap starts places itself


def stop() -> None:
    """End the workers. The next call of ``start`` or of a reward starts them again."""
    with lock:
        for sandbox in opened.values():
            sandbox.close()
        opened.clear()


def programs_of(packages: Packages = ()) -> Sandbox:
    """Where programs run that may import ``packages``."""
    return _opened(programs_of, packages)


def judges_of(packages: Packages = ()) -> Sandbox:
    """Where the tests and checkers of data sets run. It has places of its own, so that no program waits for its judge's
    place."""
    return _opened(judges_of, packages)


def _opened(which: Callable[..., Sandbox], packages: Packages) -> Sandbox:
    key: Hashable = (which, packages) if packages else which
    with lock:
        if key not in opened:
            opened[key] = _new(packages)
        return opened[key]


def _new(packages: Packages) -> Sandbox:
    if prepared is None:
        return probed_sandbox(settings["workers"], allow_unsafe=settings["allow_unsafe"], packages=packages)
    level, nursery = prepared
    return Sandbox(settings["workers"], level, find_packages(packages), nursery)
