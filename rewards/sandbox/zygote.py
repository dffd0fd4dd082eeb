"""The process that the programs of a sandbox are forked from, one at a time: a *place*.

A fresh interpreter, or the fork of one (``nursery``), without CUDA, threads or anything of the trainer's, that has shut
itself in (``confine.py``) and has imported what programs import most. For every run it is handed one end of a socket,
the run's channel, and forks a child that takes on the run's limits and the system call filter and then serves the
channel (``program.py``). The zygote reaps the child, holds it still or kills it when asked to, and reports how it
ended; it reads nothing that a program writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import sys
from typing import Any

from rewards.processes import die_with_parent, volunteer_for_death
from rewards.sandbox import confine, kernel, prelude, program
from rewards.sandbox.packages import PackageRefused, Packages

# What programs import most, so that a run finds it in memory.
WARM = """bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq io itertools json
math operator queue re statistics string threading typing"""
LAZY = {"numpy": ("numpy.random",)}  # parts that a package would load in every run anew
SIGNALS = {b"hold": signal.SIGSTOP, b"go on": signal.SIGCONT}  # all else kills
MAX_MESSAGE = 1 << 16
MAX_THREADS = 64
MAX_STACK = 64 << 20  # bytes; recursion through C (a cached function, a sort's key) takes stack


def main(control_fd: str, parent_pid: str, level: str, packages: str) -> None:
    """Entry point of a place. ``packages`` is JSON: what programs may import, which is in memory, and whose files can
    be read."""
    die_with_parent(int(parent_pid))
    _warm()
    _serve(socket.socket(fileno=int(control_fd)), level, Packages(*map(tuple, json.loads(packages))))


def nursery(control_fd: str, parent_pid: str) -> None:
    """Entry point of a nursery: fork a place for each socket that is handed over, until the control socket closes."""
    die_with_parent(int(parent_pid))
    control = socket.socket(fileno=int(control_fd))
    volunteer_for_death()
    _warm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    own_pid = os.getpid()
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"ready": own_pid}).encode())
    while True:
        message, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, 1)
        if not message:
            os._exit(0)
        try:
            if os.fork() == 0:
                _become_place(control, own_pid, json.loads(message), fds[0])
        except OSError as why:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fds[0])) as refused:
                refused.send(json.dumps({"refused": str(why)}).encode())
        os.close(fds[0])


def _become_place(control: socket.socket, nursery_pid: int, order: dict[str, Any], channel: int) -> None:
    """The forked process. Ends in ``os._exit``, whatever happens."""
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        die_with_parent(nursery_pid)
        _serve(socket.socket(fileno=channel), order["level"], Packages(*map(tuple, order["packages"])))
    finally:
        os._exit(1)


def _warm() -> None:
    for module in WARM.split():
        importlib.import_module(module)


def _serve(control: socket.socket, level: str, packages: Packages) -> None:
    """Shut in, say so, then run what is asked for until the control socket closes."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        volunteer_for_death()
        tasks = MAX_THREADS + (_tasks_of_user() if level in ("landlock", "unsafe") else 0)
        _shut_in(level, packages)
        filter_ = b"" if level == "unsafe" else kernel.seccomp_program()
    except PackageRefused as why:
        control.send(json.dumps({"refused": str(why), "package": True}).encode())
        return
    except (OSError, KeyError) as why:
        control.send(json.dumps({"refused": str(why)}).encode())
        return
    prelude.install(packages.names)
    os.environ.clear()
    del sys.argv[1:], sys.orig_argv[1:]
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at
    control.send(json.dumps({"ready": level}).encode())
    while True:
        message, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, 1)
        if not message:
            break  # the trainer has gone
        if not fds:
            continue  # a kill or another order that came too late
        limits = json.loads(message)
        fcntl.fcntl(null, fcntl.F_SETFL, os.O_RDWR)  # shared by all runs: undo the flags that one may have set
        child = os.fork()
        if child == 0:
            _become_program(fds[0], null, limits | {"tasks": tasks}, filter_)
        os.close(fds[0])
        control.send(json.dumps(_reap(control, child)).encode())
    os._exit(0)


def _shut_in(level: str, packages: Packages) -> None:
    """Packages are imported where nothing but them can be read; Landlock, which hides the names beside them, comes
    after."""
    sys.path[:] = [path for path in sys.path if "python" in path and "site-packages" not in path]
    sys.path += packages.roots
    if level == "namespaces":
        confine.enter_namespaces(packages.paths)
    _import(packages.names)
    if level == "landlock":
        confine.enter_landlock(packages.paths)
    elif level in ("namespaces", "bubblewrap") and kernel.landlock_abi():
        confine.lock_files(packages.paths)
    kernel.no_new_privileges()


def _import(names: tuple[str, ...]) -> None:
    for name in [*names, *(part for package in names for part in LAZY.get(package, ()))]:
        try:
            importlib.import_module(name)
        except Exception as why:  # a package's import runs whatever it likes
            cure = " (packages must name what a package imports, too)" if isinstance(why, ImportError) else ""
            said = f"{type(why).__name__}: {why}"[:500]
            raise PackageRefused(f"packages: {name} cannot be imported in the sandbox: {said}{cure}") from None


def _tasks_of_user() -> int:
    """How many threads this user runs. In a user namespace of its own, a limit counts only the threads in there."""
    total = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{process}").st_uid == os.geteuid():
                total += len(os.listdir(f"/proc/{process}/task"))
    return total


def _become_program(channel: int, null: int, limits: dict[str, Any], filter_: bytes) -> None:
    """The child of a run. Ends in ``os._exit``, whatever happens."""
    try:
        os.setsid()
        die_with_parent(os.getppid())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        channel = os.dup2(channel, 3, inheritable=False)
        os.closerange(4, 256)
        request = program.receive(channel)
        if request.mode == "script":
            os.dup2(_in_memory(request.input.encode("utf-8", "surrogatepass")), 0)
            os.dup2(channel, 1)
            os.closerange(3, 256)
        _limit(limits)
        random.seed(0)  # a reward should not depend on luck
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        if filter_:
            kernel.seccomp(filter_)
        program.serve(channel, request)
    finally:
        os._exit(1)


def _in_memory(content: bytes) -> int:
    """A file without a name that holds ``content``, to be read from its start."""
    fd = os.memfd_create("stdin")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _limit(limits: dict[str, Any]) -> None:
    memory, seconds = limits["memory_bytes"], limits["cpu_seconds"]
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),  # the trainer's clock runs out first; this one sums over threads
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_STACK, MAX_STACK),  # it is taken as it is used, from the address space above
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NPROC, limits["tasks"]),  # does not bind root
    ):
        _, ceiling = resource.getrlimit(what)
        limit = limit if ceiling == resource.RLIM_INFINITY else min(limit, ceiling)
        resource.setrlimit(what, (limit, limit))


def _reap(control: socket.socket, child: int) -> dict[str, int]:
    """Wait for the child, or for the order to kill it; between these it is held still and let go on as told. Returns
    how it ended."""
    end = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.register(control, select.POLLIN)
        while not any(fd == end for fd, _ in poll.poll()):
            order = control.recv(MAX_MESSAGE)
            if not order:
                os._exit(0)  # the trainer has gone: so do we, and our children with us
            os.kill(child, SIGNALS.get(order, signal.SIGKILL))
    finally:
        os.close(end)
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status)}
