"""The names that a program finds without importing them, as those who wrote its task assumed.

LiveCodeBench puts these imports before every solution, and LeetCode's site has most of them. They become built-in
names, which a program's own definitions hide. So what a program has *defined* is what is in its module, and a task
called ``gcd`` is not solved by the ``gcd`` that is there anyway.
"""

from __future__ import annotations

import builtins
import sys
from typing import Any

# In LiveCodeBench's order: of two equal names the later one counts, and Python's own built-in names before all.
PRELUDE = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from typing import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools
import operator, io, sys, json
"""
IF_PERMITTED = {"sortedcontainers": "from sortedcontainers import *"}  # LeetCode has it too
DEVICES = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
RECURSION_LIMIT = 50_000 if sys.version_info >= (3, 11) else 10_000  # before 3.11 each takes stack


def install(packages: tuple[str, ...] = ()) -> None:
    """Make the names built in, in this process and in its children; ``packages`` are those that programs may import."""
    names: dict[str, Any] = {}
    exec(PRELUDE, names)
    for package in packages:
        exec(IF_PERMITTED.get(package, ""), names)
    for name, value in {**names, "quit": sys.exit}.items():
        if not hasattr(builtins, name):
            setattr(builtins, name, value)
    sys.setrecursionlimit(RECURSION_LIMIT)


def bind_streams() -> None:
    """Let ``stdin`` and ``stdout`` be those that ``sys`` has now, and ``/dev/stdin`` be there without a ``/dev``."""
    for name in ("stdin", "stdout"):
        setattr(builtins, name, getattr(sys, name))
    open_file = builtins.open

    def open_(file: Any, *arguments: Any, **named: Any) -> Any:
        descriptor = DEVICES.get(file) if isinstance(file, str) else None
        return open_file(file if descriptor is None else descriptor, *arguments, **named)

    builtins.open = open_
