"""Before a sandbox is trusted it is attacked: a level that lets any of these through is not used.

The same attacks, and fifty more, are in the tests; these four stand for files, network, processes and secrets.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rewards.sandbox.packages import find_packages
from rewards.sandbox.pool import LEVELS, Limits, Sandbox
from rewards.sandbox.program import Request
from rewards.sandbox.starting import SandboxUnavailable

logger = logging.getLogger(__name__)

ATTACKS = {
    "start a process": "import os\npid = os.fork()\nif pid == 0:\n    os._exit(0)\nos.waitpid(pid, 0)",
    "use the network": "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
    "write a file": "open({folder!r} + '/written', 'w')",
    "read a secret": "open({folder!r} + '/secret').read()",
}
LIMITS = Limits(seconds=10.0)


def probed_sandbox(workers: int = 2, *, allow_unsafe: bool = False, packages: Sequence[str] = ()) -> Sandbox:
    """A sandbox at the strongest level that withstands the attacks. Programs may import ``packages``, by their names.

    Raises:
        SandboxUnavailable: none does, and ``allow_unsafe`` is not set; the message says what each let through.
        PackageRefused: a package is not here, or cannot be imported in the sandbox.
    """
    found = find_packages(packages)
    refusals = []
    for level in LEVELS:
        begun = time.perf_counter()
        try:
            sandbox = Sandbox(workers, level, found)
        except SandboxUnavailable as why:
            refusals.append(f"{level}: {why}")
            continue
        broken = attacked(sandbox)
        if not broken:
            logger.info("sandbox: level %s, attacked and held, %.2f s", level, time.perf_counter() - begun)
            return sandbox
        sandbox.close()
        refusals.append(f"{level}: a program could {', '.join(broken)}")
    if allow_unsafe:
        logger.warning("sandbox: none holds here (%s); allow_unsafe: programs run unconfined", "; ".join(refusals))
        return Sandbox(workers, "unsafe", found)
    raise SandboxUnavailable(
        f"no sandbox holds here ({'; '.join(refusals)}). Allow unprivileged user namespaces, use a kernel with "
        "Landlock (5.13), or install bubblewrap; `allow_unsafe: true` runs model-written programs with the rights of "
        "this process"
    )


def attacked(sandbox: Sandbox) -> list[str]:
    """What a program in this sandbox could do and should not, in words."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)  # as open as a file tree can be
        Path(folder, "secret").write_text("secret")
        sources = {what: source.format(folder=folder) for what, source in ATTACKS.items()}
        return [what for what, source in sources.items() if not _refused(sandbox, source)]


def _refused(sandbox: Sandbox, source: str) -> bool:
    with sandbox.run(Request("calls", source), LIMITS) as run:
        run.finish_sending()
        line = run.line()
    return line is not None and line.startswith(b"failed denied ")
