"""Honest programs that a sandbox must run, however it shuts them in: for ``f(1), f(2), f(3)``, expected 2, 3, 4."""

from __future__ import annotations

HONEST = "def f(x):\n    return x + 1\n"
MUST_PASS = {
    "honest": HONEST,
    "56 an empty environment": "import os\ndef f(x):\n    return x + 1 + len(os.environ)",
    "57 no inherited descriptors": (
        "import os\ndef f(x):\n    found = []\n    for fd in range(1024):\n        try:\n            os.fstat(fd)\n"
        "            found.append(fd)\n        except OSError:\n            pass\n"
        "    return x + 1 if found == [0, 1, 2, 3] else found"
    ),
    "58 threads": (
        "import threading\ndef f(x):\n    out = []\n    threads = [threading.Thread(target=out.append, args=(i,)) "
        "for i in range(8)]\n    for t in threads:\n        t.start()\n    for t in threads:\n        t.join()\n"
        "    return x + 1 if sorted(out) == list(range(8)) else 0"
    ),
    "asyncio": (
        "import asyncio\nasync def g(x):\n    await asyncio.sleep(0.001)\n    return x + 1\n"
        "def f(x):\n    return asyncio.run(g(x))"
    ),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(20000)\ndef f(x, n=10000):\n    return f(x, n - 1) if n else x + 1"
    ),
    "imports": "import ctypes, decimal, hashlib, struct, unicodedata, uuid, zlib\ndef f(x):\n    return x + 1",
    "what the run before may have left": (
        "import fcntl\ndef f(x):\n    return x + 1 + sum(fcntl.fcntl(fd, fcntl.F_GETFL) & 0o6000 for fd in range(3))"
    ),
    "a method": "class Solution:\n    def f(self, x: int) -> int:\n        return x + 1",
    "prints": "def f(x):\n    print('debugging')\n    return x + 1",
    "main guard": "def f(x):\n    return x + 1\nif __name__ == '__main__':\n    raise ValueError(input())",
}
