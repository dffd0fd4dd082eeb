"""A sandbox for model-written Python: hundreds of runs a second, and nothing that a program does outlives its run.

    kernel.py     what Linux offers an unprivileged process: seccomp, Landlock, namespaces, mounts
    confine.py    which of it applies here (the *level*), and how a zygote shuts itself in
    zygote.py     the process that forks one child a run, in which the program runs
    program.py    what happens in that child
    cells.py      pieces of code that share their variables, there
    session.py    such a session, seen from outside
    prelude.py    the names that programs find without an import
    packages.py   installed packages that they may import
    values.py     plain values over a pipe, with their exact types
    pool.py       the trainer's end: zygotes, deadlines, output limits, respawning
    starting.py   how their processes are started
    nursery.py    a process that forks them, where each serves for a short time
    probe.py      real attacks, tried before a level is trusted

Expected outputs never enter it: a program returns values, and whoever asked compares them. So even a program that takes
over its whole process can only return values of its choice.
"""

from rewards.sandbox.packages import PackageRefused
from rewards.sandbox.pool import Ended, Limits, Run, Sandbox
from rewards.sandbox.probe import probed_sandbox
from rewards.sandbox.session import Session
from rewards.sandbox.starting import SandboxUnavailable

__all__ = ["Ended", "Limits", "PackageRefused", "Run", "Sandbox", "SandboxUnavailable", "Session", "probed_sandbox"]
