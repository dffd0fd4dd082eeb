"""How a Linux process gives up rights: seccomp, Landlock, namespaces, read-only mounts, no capabilities.

Thin over the system calls, through ctypes, since the standard library has none of them. Every function raises OSError
with the call's name if the kernel, or a sandbox that this process is already in, says no.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_THREAD = 0x10000000, 0x20000000, 0x40000000, 0x00010000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22


def _call(name: str, *arguments: object) -> int:
    """A libc function or, for a number, a raw system call."""
    result = getattr(libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(name: str, number: int, *arguments: object) -> int:
    ctypes.set_errno(0)
    result = libc.syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def unshare(flags: int) -> None:
    _call("unshare", flags)


def no_new_privileges() -> None:
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop_capabilities() -> None:
    """Give up all capabilities of this process; without exec there is no way back."""
    header = struct.pack("Ii", 0x20080522, 0)
    _call("capset", header, struct.pack("6I", 0, 0, 0, 0, 0, 0))


# --- mounts ----------------------------------------------------------------------------------------------------------


def make_mounts_private() -> None:
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)


def mount_tmpfs(where: str) -> None:
    _call("mount", b"tmpfs", where.encode(), b"tmpfs", 2 | 4, b"size=64k,mode=755")  # nosuid, nodev


def bind(source: str, target: str) -> None:
    _call("mount", source.encode(), target.encode(), None, MS_BIND | MS_REC, None)


def make_read_only(where: str) -> None:
    """Make a mount and all below it read-only, without set-user-id and devices (mount_setattr, Linux 5.12)."""
    at_recursive, read_only_nosuid_nodev = 0x8000, 1 | 2 | 4
    attributes = struct.pack("4Q", read_only_nosuid_nodev, 0, 0, 0)
    at_fdcwd = ctypes.c_int(-100)
    _syscall("mount_setattr", 442, at_fdcwd, where.encode(), at_recursive, attributes, len(attributes))


def pivot_root(new_root: str) -> None:
    """Make ``new_root`` the root and let go of the old one."""
    number = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    os.chdir(new_root)
    _syscall("pivot_root", number, b".", b".")  # the old root is now stacked on the new one
    _call("umount2", b".", 2)  # MNT_DETACH
    os.chdir("/")


# --- Landlock --------------------------------------------------------------------------------------------------------

# Bits of the file system rights: all of them, by ABI version, and the ones that reading takes.
FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
READ_FILE, READ_DIR = 1 << 2, 1 << 3
BIND_TCP_CONNECT_TCP, SCOPE_ABSTRACT_UNIX_SIGNAL = 0b11, 0b11


def landlock_abi() -> int:
    """Landlock's version, 0 where the kernel has none."""
    try:
        return _syscall("landlock_create_ruleset", 444, None, 0, 1)
    except OSError:
        return 0


def landlock_read_only(readable: Sequence[str]) -> None:
    """From now on this process and its children may read below ``readable`` and touch no other file; no TCP."""
    abi = landlock_abi()
    rights = FS_RIGHTS[min(abi, max(FS_RIGHTS))]
    fields = [rights, BIND_TCP_CONNECT_TCP, SCOPE_ABSTRACT_UNIX_SIGNAL][: 3 if abi >= 6 else 2 if abi >= 4 else 1]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = _syscall("landlock_create_ruleset", 444, attributes, len(attributes), 0)
    try:
        for path in readable:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = struct.pack("=Qi", READ_FILE | (READ_DIR if os.path.isdir(path) else 0), place)
                _syscall("landlock_add_rule", 445, ruleset, 1, rule, 0)
            finally:
                os.close(place)
        _syscall("landlock_restrict_self", 446, ruleset, 0)
    finally:
        os.close(ruleset)


# --- seccomp ---------------------------------------------------------------------------------------------------------

# What a Python program needs once it runs: memory, files that are there, clocks, threads, polling. Everything else is
# refused with EPERM: other processes, sockets, signals to others, changes of files, limits, namespaces, keys, io_uring…
# Each with its number on x86_64 and on aarch64, a dash where the machine has no such call.
ALLOWED = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, mincore 27 232, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101,
getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39 172, exit 60 93, uname 63 160, getdents 78 -,
getcwd 79 17, chdir 80 49, readlink 89 -, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179,
times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -,
getgroups 115 158, getpgid 121 155, getsid 124 156, rt_sigpending 127 136, sigaltstack 131 132, arch_prctl 158 -,
gettid 186 178, time 201 -, futex 202 98, sched_getaffinity 204 123, getdents64 217 61, set_tid_address 218 96,
restart_syscall 219 128, fadvise64 221 223, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21, openat 257 56, newfstatat 262 79, readlinkat 267 78,
faccessat 269 48, pselect6 270 72, ppoll 271 73, set_robust_list 273 99, get_robust_list 274 100,
epoll_pwait 281 22, eventfd2 290 19, epoll_create1 291 20, dup3 292 24, pipe2 293 59, preadv 295 69,
pwritev 296 70, getcpu 309 168, getrandom 318 278, membarrier 324 283, statx 332 291, rseq 334 293,
close_range 436 436
"""
# glibc tries these first and does without them if they do not exist.
ABSENT = {"clone3": (435, 435), "openat2": (437, 437), "faccessat2": (439, 439)}
# Allowed with certain arguments: the call's name and numbers and, for each argument that is checked, its index, a mask,
# and the values that it may have under the mask.
WHOLE = 0xFFFFFFFF
NULL = (0,)
CONDITIONAL: list[tuple[str, tuple[int, int], list[tuple[int, int, tuple[int, ...]]]]] = [
    ("clone", (56, 220), [(0, CLONE_THREAD, (CLONE_THREAD,))]),  # a thread, no process
    ("socketpair", (53, 199), [(0, WHOLE, (1,))]),  # AF_UNIX: asyncio wakes itself through one
    ("sendto", (44, 206), [(3, WHOLE, (0,)), (4, WHOLE, NULL)]),  # to the other end of that pair, to no address
    ("recvfrom", (45, 207), [(3, WHOLE, (0,)), (4, WHOLE, NULL)]),
    ("prlimit64", (302, 261), [(2, WHOLE, NULL)]),  # with no new limit: reading alone
    ("ioctl", (16, 29), [(1, WHOLE, (0x5401, 0x5421))]),  # TCGETS: is this a terminal? FIONBIO: non-blocking
    ("fcntl", (72, 25), [(1, WHOLE, (0, 1, 2, 3, 4, 1030))]),  # duplicates and flags; no owner to send signals to
]
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
LD, JEQ, JGE, AND, RET = 0x20, 0x15, 0x35, 0x54, 0x06
SYSCALL_NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def seccomp_program() -> bytes:
    """The filter as BPF instructions for this machine's architecture; KeyError where that is not supported."""
    machine = platform.machine()
    which = {"x86_64": 0, "aarch64": 1}[machine]
    code = [_bpf(LD, 0, 0, ARCH), _bpf(JEQ, 1, 0, AUDIT_ARCH[machine]), _bpf(RET, 0, 0, KILL)]
    code += [_bpf(LD, 0, 0, SYSCALL_NUMBER), _bpf(JGE, 0, 1, 0x40000000), _bpf(RET, 0, 0, KILL)]  # no x32 calls
    for entry in ALLOWED.split(","):
        number = entry.split()[1 + which]
        if number != "-":
            code += [_bpf(JEQ, 0, 1, int(number)), _bpf(RET, 0, 0, ALLOW)]
    for numbers in ABSENT.values():
        code += [_bpf(JEQ, 0, 1, numbers[which]), _bpf(RET, 0, 0, ERRNO | ENOSYS)]
    for _, numbers, conditions in CONDITIONAL:
        checks = [check for condition in conditions for check in _check_argument(*condition)]
        checks.append(_bpf(RET, 0, 0, ALLOW))
        code += [_bpf(JEQ, 0, len(checks), numbers[which]), *checks]
    code.append(_bpf(RET, 0, 0, ERRNO | EPERM))
    return b"".join(code)


def _check_argument(argument: int, mask: int, values: tuple[int, ...]) -> list[bytes]:
    """Instructions that refuse the call unless an argument, under a mask, is one of ``values``."""
    low, high = ARGUMENTS + 8 * argument, ARGUMENTS + 8 * argument + 4
    refuse = _bpf(RET, 0, 0, ERRNO | EPERM)
    checks = []
    if mask == WHOLE:  # the upper half, which is part of a pointer, must be 0
        checks += [_bpf(LD, 0, 0, high), _bpf(JEQ, 1, 0, 0), refuse]
    checks += [_bpf(LD, 0, 0, low), _bpf(AND, 0, 0, mask)]
    for left, value in zip(reversed(range(len(values))), values, strict=True):
        checks.append(_bpf(JEQ, left + 1, 0, value))  # jumps over the remaining values and the refusal
    return [*checks, refuse]


def seccomp(program: bytes) -> None:
    """Put this process under a filter, for good. Needs ``no_new_privileges`` (or CAP_SYS_ADMIN) before."""
    instructions = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    _call("prctl", PR_SET_SECCOMP, 2, filter_, 0, 0)


def _bpf(code: int, jump_true: int, jump_false: int, value: int) -> bytes:
    return struct.pack("HBBI", code, jump_true, jump_false, value)
