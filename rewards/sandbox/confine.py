"""How a zygote shuts itself in, and every program that it will run with it.

Three levels, the strongest that works is taken:

    namespaces  its own users, mounts, processes, network, IPC and host name: a root of read-only Python and system
                libraries and nothing else, no interface, no process to see; Landlock on top where the kernel has it
    landlock    the machine's own file tree and network, which Landlock and the system call filter keep shut
    bubblewrap  what `bwrap` can do where only it may make namespaces (some distributions allow it by name)

At every level, each run also gets the same system call filter (``zygote.py``). A level is set up once per zygote and
inherited by its children, so that it costs a run nothing.
"""

from __future__ import annotations

import glob
import os
import sys
import sysconfig
from collections.abc import Sequence

from rewards.processes import die_with_parent
from rewards.sandbox import kernel

NOBODY = 65534
STAGE = "/sys"  # a folder that is always there and holds no Python: the new root is mounted over it


def readable_paths() -> list[str]:
    """The folders of the standard library and of the libraries that its extension modules load."""
    candidates = [sysconfig.get_path("stdlib"), os.path.join(sys.base_prefix, "lib"), "/usr/lib", "/usr/lib64"]
    candidates += ["/lib", "/lib64", os.path.dirname(os.__file__)]
    found: list[str] = []
    for path in sorted({os.path.realpath(path) for path in candidates if os.path.isdir(path)}):
        if not any(path == parent or path.startswith(parent + "/") for parent in found):
            found.append(path)
    return found


def hidden_paths() -> list[str]:
    """Installed packages within ``readable_paths``: no program needs them, and one may hold a data set's solutions."""
    names = ("site-packages", "dist-packages")
    patterns = [f"{path}/{below}{name}" for path in readable_paths() for below in ("", "python*/") for name in names]
    return sorted({os.path.realpath(found) for pattern in patterns for found in glob.glob(pattern)})


def _without(paths: list[str], hidden: list[str]) -> list[str]:
    """Paths that together hold what is below ``paths``, except what is below ``hidden``."""
    result = []
    for path in paths:
        if not any(h == path or h.startswith(path + "/") for h in hidden):
            result.append(path)
        elif path not in hidden:
            below = [os.path.join(path, name) for name in os.listdir(path)]
            result += _without([name for name in below if not os.path.islink(name)], hidden)  # links may lead elsewhere
    return result


def enter_namespaces(more: Sequence[str] = ()) -> None:
    """Shut this process in and go on as process 1 of the new namespaces; the caller's process stays outside as its
    parent and ends with it. ``more`` are paths that are there, read-only, beside Python and its libraries. Raises
    OSError where that is not allowed."""
    paths, links = readable_paths(), library_links()
    was_root = os.geteuid() == 0
    _become_namespaced(was_root)
    child = os.fork()
    if child:
        _end_with(child)
    die_with_parent(0)  # from inside the namespace, the parent's number is 0
    _build_root(paths, more, links)
    if was_root:  # user 1 of the namespace is nobody outside: not root, even if a wall falls
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
        die_with_parent(0)  # the change of user has undone it
    kernel.drop_capabilities()


def _become_namespaced(was_root: bool) -> None:
    """New namespaces for this process and its children. Their users are its own user and, for root, nobody too."""
    me = os.getpid()
    uids = f"0 0 1\n1 {NOBODY} 1" if was_root else f"0 {os.geteuid()} 1"
    gids = f"0 0 1\n1 {NOBODY} 1" if was_root else f"0 {os.getegid()} 1"
    ready, go = os.pipe()
    helper = os.fork() if was_root else 0  # only a process outside may write a map of two users
    if was_root and helper == 0:
        status = 1
        try:
            os.close(go)
            if os.read(ready, 1):
                _write(f"/proc/{me}/uid_map", uids)
                _write(f"/proc/{me}/gid_map", gids)
                status = 0
        finally:
            os._exit(status)
    os.close(ready)
    flags = kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
    try:
        kernel.unshare(flags | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP)
        if was_root:
            os.write(go, b"!")
        else:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", uids)
            _write("/proc/self/gid_map", gids)
    finally:
        os.close(go)
        if was_root:
            _, status = os.waitpid(helper, 0)
    if was_root and status:
        raise PermissionError("the user map of the namespace could not be written")


def _end_with(child: int) -> None:
    """Outside the namespaces: hold nothing, wait for process 1, and end as it does. Process 1 dies with this one."""
    os.closerange(3, 1024)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _build_root(paths: list[str], more: Sequence[str], links: dict[str, str]) -> None:
    """A root that holds ``paths`` without what is hidden, and ``more``, all read-only, and the symbolic links by which
    libraries are found."""
    kernel.make_mounts_private()
    kernel.mount_tmpfs(STAGE)
    for path in paths:
        os.makedirs(STAGE + path, exist_ok=True)
        kernel.bind(path, STAGE + path)
    for path in hidden_paths():
        kernel.mount_tmpfs(STAGE + path)
    for path in more:
        if not os.path.exists(STAGE + path):
            os.makedirs(STAGE + (path if os.path.isdir(path) else os.path.dirname(path)), exist_ok=True)
            if not os.path.isdir(path):
                _write(STAGE + path, "")
        kernel.bind(path, STAGE + path)
    for link, target in links.items():
        if not os.path.lexists(STAGE + link):
            os.symlink(target, STAGE + link)
    kernel.pivot_root(STAGE)
    kernel.make_read_only("/")


def library_links() -> dict[str, str]:
    """``/lib -> usr/lib`` and the like, where this system has them."""
    return {path: os.readlink(path) for path in ("/lib", "/lib64") if os.path.islink(path)}


def enter_landlock(more: Sequence[str] = ()) -> None:
    """Without namespaces: Landlock, and a user other than root if Python stays readable for that user. ``more`` are
    paths that can be read beside it.

    Raises OSError where the kernel has no Landlock."""
    parent = os.getppid()
    if os.geteuid() == 0 and all(map(_open_to_all, [*readable_paths(), *more])):
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        die_with_parent(parent)
    os.chdir("/")
    lock_files(more)


def lock_files(more: Sequence[str] = ()) -> None:
    """Landlock on this process and its children: reading Python and libraries, and ``more``, and nothing else."""
    if not kernel.landlock_abi():
        raise OSError("this kernel has no Landlock")
    kernel.no_new_privileges()
    kernel.landlock_read_only([*_without(readable_paths(), hidden_paths()), *more])


def _open_to_all(path: str) -> bool:
    """Whether every user may read a folder: each folder on the way to it may be entered by others."""
    while True:
        if os.stat(path).st_mode & 0o005 != 0o005:
            return False
        if path == "/":
            return True
        path = os.path.dirname(path)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
