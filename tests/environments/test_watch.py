"""What an episode has started, together: processes and memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from grpo.environments.watch import MAX_PROCESSES, too_much
from rewards.processes import kill

MB = 1 << 20


@contextmanager
def processes(code: str) -> Iterator[int]:
    """The id of a process that has run ``code`` and waits."""
    code = f"import os, sys, time\n{code}\nprint(flush=True)\ntime.sleep(100)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process.pid
    finally:
        kill(process)
        process.stdout.close()


def children(number: int, megabytes: int) -> str:
    return (
        f"ready, tell = os.pipe()\nfor _ in range({number}):\n    if os.fork() == 0:\n"
        f"        kept = os.urandom({megabytes << 20})\n        os.write(tell, b'x')\n        time.sleep(100)\n"
        f"for _ in range({number}):\n    os.read(ready, 1)"
    )


def test_many_processes() -> None:
    with processes(children(MAX_PROCESSES + 1, 0)) as pid:
        assert too_much(pid, None) == ("crashed", "it has started more than 64 processes")
    with processes(children(3, 0)) as pid:
        assert too_much(pid, None) is too_much(pid, 300 * MB) is None


def test_memory_is_that_of_all_together() -> None:
    with processes(children(2, 20)) as pid:
        cause, says = too_much(pid, 30 * MB) or ("", "")
        assert (cause, says) == ("memory", "its 2 processes take more than environment.memory_limit_gb together")
        assert too_much(pid, 100 * MB) is None


def test_what_processes_share_counts_once() -> None:
    with processes(f"kept = os.urandom({40 << 20})\n" + children(4, 0)) as pid:
        assert too_much(pid, 60 * MB) is None  # each of them holds 40 and more
