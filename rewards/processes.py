"""What worker processes have in common: how they start, what they may use, and that none outlives its parent.

Verifiers with workers of their own (``rewards.math``, ``rewards.sandbox``) use it, and so do the trainer's scoring
workers. Standard library only.

A worker has a *guard* between itself and the trainer: a process that does nothing but wait. The kernel hands it
whatever the worker started and left behind, in a session of its own or not (it is a "subreaper"). So all of that is in
the tree below the guard, and ends with the worker, however the worker or the trainer ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rewards.secrets import without_secrets

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SECONDS_TO_END = 5.0  # for a tree of processes: one that waits for a broken disk cannot be killed
ROOT = str(Path(__file__).resolve().parents[1])  # holds rewards, and grpo if it is installed
# ROOT comes first during this import, so that a user's own `rewards` or `grpo` is not taken for ours.
BOOT = "import sys; sys.path[:] = sys.argv[{n}:]; from rewards.processes import guard; "
BOOT += "*fds, trainer = map(int, sys.argv[1:{n}]); parent = guard(trainer); "
BOOT += "from {module} import serve; sys.path.pop(0); serve(*fds, parent)"


# --- in the process that is started -----------------------------------------------------------------------------------


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent ends; end at once if that has happened already.

    The kernel does so even while C code holds the interpreter. A change of user undoes it. The kernel watches the
    *thread* that started this process: see ``on_staying_thread``. On systems other than Linux, a thread of this process
    watches instead.
    """
    bound = _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the kernel knew
        os._exit(1)
    if not bound:
        threading.Thread(target=_watch, args=(parent_pid,), daemon=True).start()


def _prctl(option: int, value: int) -> bool:
    """Whether the kernel did as it was told; never on systems other than Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0
    return False


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)


def limit_memory(memory_bytes: int | None) -> None:
    """Limit this process's address space, never above its present limit. Core files are turned off too."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def volunteer_for_death() -> None:
    """If memory runs out, the kernel shall kill this process and its children, not the trainer."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def many_files() -> None:
    """Let this process open as many files as the system allows it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- between the two --------------------------------------------------------------------------------------------------


def guard(parent_pid: int) -> int:
    """Fork, and return in the child, which is to become the worker: the process id of its parent.

    This process stays behind as the worker's guard. When the worker ends, it ends all that the worker has left behind,
    and then itself in the same way as the worker. When the trainer (``parent_pid``) ends, it ends the worker too. It
    passes SIGUSR1 on. Systems other than Linux have no guards.
    """
    if not _prctl(PR_SET_CHILD_SUBREAPER, 1):
        return parent_pid
    guard_pid, signals = os.getpid(), signal.valid_signals()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    worker = os.fork()
    if worker == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return guard_pid
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if fd > 2:
                os.close(fd)  # the ends of pipes are the worker's alone
    _prctl(PR_SET_PDEATHSIG, signal.SIGHUP)  # it wakes this process up
    while os.getppid() == parent_pid:
        status = _reap(worker)
        if status is not None:
            end_descendants(guard_pid)
            _end_like(status)
        if signal.sigwait(signals) == signal.SIGUSR1:
            os.kill(worker, signal.SIGUSR1)
    end_descendants(guard_pid)
    os._exit(1)


def _reap(worker: int) -> int | None:
    """Bury children that have ended. The worker's wait status, if it is one of them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found = ended[1] if ended[0] == worker else found
    return found


def _end_like(status: int) -> None:
    """End this process as the one ended whose wait status this is."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


def end_descendants(pid: int) -> None:
    """Kill all processes below one, those that they start meanwhile included. None may fork while others are killed, so
    they are stopped first."""
    deadline = time.monotonic() + SECONDS_TO_END
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:  # one look may miss what moves in the list
        stopped: set[int] = set()
        while new := set(living_below(pid)) - stopped:
            _signal(new, signal.SIGSTOP)
            stopped |= new
        _signal(stopped, signal.SIGKILL)
        quiet = 0 if stopped else quiet + 1


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def living_below(pid: int) -> list[int]:
    """All processes below one that have not ended."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children = children_of(waiting.pop())
        waiting += children
        found += filter(_lives, children)
    return found


def children_of(pid: int) -> list[int]:
    """The children of a process, oldest first; none where it has ended."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    return found


def _lives(pid: int) -> bool:
    """Whether it is more than what remains until somebody waits for it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


# --- in the process that starts it ------------------------------------------------------------------------------------


def start_python(
    module: str,
    fds: Sequence[int],
    *,
    stdout: int | None = None,
    keep: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a new interpreter that calls ``module.serve(*fds, pid of its parent)``, and its guard.

    It has this process's import path and the open files ``fds``. It is in a session of its own: Ctrl-C does not reach
    it, and ``kill`` ends it together with the programs that it started. It is neither a fork (CUDA, threads) nor a
    "spawn" of multiprocessing (which runs ``__main__`` again). ``serve`` should begin with ``die_with_parent``.

    It has this process's environment without what looks like a secret (``rewards.secrets``), but for the variables
    that ``keep`` names, and ``variables`` beside it.

    What is returned is the guard, which ends as the worker ends; ``worker_pid`` is the worker's own number.

    Raises:
        OSError: the system has no room for another process.
    """
    path = [entry or os.getcwd() for entry in sys.path]
    boot = BOOT.format(module=module, n=len(fds) + 2)
    command = [sys.executable, "-c", boot, *map(str, fds), str(os.getpid()), ROOT, *path]
    return on_staying_thread(
        lambda: subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            pass_fds=tuple(fds),
            env=without_secrets(os.environ, keep) | dict(variables or {}),
            start_new_session=True,
        )
    )


def worker_pid(process: subprocess.Popen[bytes]) -> int:
    """The process id of the worker behind a guard."""
    return next(iter(children_of(process.pid)), process.pid)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session of its own, with all that it has started, and wait for its end."""
    if process.poll() is None:
        end_descendants(process.pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def how_it_ended(process: subprocess.Popen[bytes], patience: float) -> str:
    """How a process ended by itself, in words. It has closed its pipe; its end is awaited for ``patience`` seconds."""
    try:
        code = process.wait(patience)
    except subprocess.TimeoutExpired:
        return "closed its pipe"
    if code >= 0:
        return f"exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


def on_staying_thread(function: Callable[[], T]) -> T:
    """Run a function on a thread that lives as long as this process, and return or raise what it does.

    Processes are started there: ``die_with_parent`` ties a process to the thread that started it.
    """
    global _thread
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_serve, name="process-starter", daemon=True)
            _thread.start()
    result: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    _orders.put((function, result))
    value, why = result.get()
    if why is not None:
        raise why
    return value


_orders: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
_thread: threading.Thread | None = None
_lock = threading.Lock()


def _serve() -> None:
    while True:
        function, result = _orders.get()
        try:
            result.put((function(), None))
        except BaseException as why:  # the caller's to handle
            result.put((None, why))


def _forget() -> None:
    """In a forked child there is no such thread."""
    global _orders, _thread, _lock
    _orders, _thread, _lock = queue.SimpleQueue(), None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
