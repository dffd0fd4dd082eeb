"""A process that places of the sandbox are forked from, where many are needed and each for a short time.

A place has an interpreter of its own, which takes a tenth of a second of a core to start. An environment opens one for
each episode, so hundreds at once. Forked from here a place takes a fifth of that. The nursery is a fresh interpreter as
a place is, and runs no program itself: what it forks shuts itself in before it takes one.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import astuple

from rewards.processes import kill
from rewards.sandbox.packages import Packages
from rewards.sandbox.starting import SandboxUnavailable, hello, start_process


class Nursery:
    """``begin`` forks a place. A process and those that are forked from it may share one. Close it in the process that
    made it.

    Raises:
        SandboxUnavailable: it cannot be started.
    """

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = start_process("nursery", (str(theirs.fileno()), str(os.getpid())), theirs.fileno())
        said = hello(self._control)
        if "ready" not in said:
            self.close()
            raise SandboxUnavailable(said["refused"])

    def begin(self, level: str, packages: Packages, control: socket.socket) -> None:
        """Fork a place whose orders come through the other end of ``control``, and which answers there. Raises OSError
        where the nursery has ended."""
        order = json.dumps({"level": level, "packages": astuple(packages)}).encode()
        socket.send_fds(self._control, [order], [control.fileno()])

    def close(self) -> None:
        """End it, and all places that were forked from it."""
        kill(self._process)
        self._control.close()
