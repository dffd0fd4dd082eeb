"""The sandboxes of the code reward: one for programs, one for the tests that judge them, for each set of packages."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from typing import Any

from rewards.sandbox import Sandbox, probed_sandbox

Packages = tuple[str, ...]

lock = threading.Lock()
opened: dict[Hashable, Sandbox] = {}
settings: dict[str, Any] = {"workers": os.cpu_count() or 1, "allow_unsafe": False}


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
            opened[key] = probed_sandbox(settings["workers"], allow_unsafe=settings["allow_unsafe"], packages=packages)
        return opened[key]
