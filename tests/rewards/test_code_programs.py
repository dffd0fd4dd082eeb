"""Programs of the code reward as models write them: what a test swallows, what they find, and how they end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rewards import code
from rewards.code import verify
from rewards.sandbox import Limits
from rewards.verdict import Outcome

RIGHT = "def f(x): return x + 1"


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    code.start(1)
    yield
    code.stop()


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


def outcome(tests: object, program: str) -> Outcome:
    return verify(tests, fenced(program), limits=Limits(1.0)).outcome


# --- what a test swallows, and what it may expect ---------------------------------------------------------------------

SWALLOWING = {
    "map and zip": "for got, want in zip(map(candidate, [1, 2]), [2, 3]):\n        assert got == want",
    "filter": "assert not [x for x in filter(candidate, [1, 2]) if x > 2]",
    "all over map": "assert all(map(lambda x: candidate(x) == x + 1, [1, 2]))",
    "next with a default": "assert next(map(candidate, [1]), 2) == 2",
    "a loop over map": "for got in map(candidate, [1, 2]):\n        assert got > 1",
    "an old sequence": "class Old:\n        def __getitem__(self, i):\n            return candidate(i) and i\n"
    "    assert all(i < 9 for i in Old())",
    "getattr with a default": "class P:\n        value = property(lambda self: candidate(1))\n"
    "    assert getattr(P(), 'value', 2) == 2",
    "a length that is not asked for": "class L:\n        def __iter__(self):\n            return iter([])\n"
    "        def __len__(self):\n            return candidate(1)\n    assert list(L()) == []",
}
RAISED = ("StopIteration", "StopAsyncIteration", "GeneratorExit", "IndexError", "AttributeError", "TypeError")
RAISED += ("SystemExit(0)", "KeyboardInterrupt", "LookupError", "Exception", "BaseException", "AssertionError")


@pytest.mark.parametrize("body", SWALLOWING.values(), ids=SWALLOWING.keys())
def test_an_exception_that_the_test_s_own_machinery_swallows_pays_nobody(body: str) -> None:
    tests = {"fn_name": "f", "test": f"def check(candidate):\n    {body}\n"}
    for raised in RAISED:
        assert outcome(tests, f"def f(x): raise {raised}") in (Outcome.WRONG, Outcome.NO_RESULT), raised
    assert outcome(tests, "import os\ndef f(x): os._exit(0)") is Outcome.NO_RESULT
    assert outcome(tests, "class Stop(StopIteration): pass\ndef f(x): raise Stop") is Outcome.WRONG
    assert outcome(tests, "def f(x): return f(x)") is Outcome.LIMIT


def test_a_handler_does_not_let_an_iteration_end_early() -> None:
    test = "def check(candidate):\n    try:\n        candidate('no')\n    except TypeError:\n        pass\n"
    test += "    for got, want in zip(map(candidate, [1, 2]), [2, 3]):\n        assert got == want\n"
    tests = {"fn_name": "f", "test": test}
    assert outcome(tests, RIGHT) is Outcome.CORRECT
    for raised in ("StopIteration", "StopAsyncIteration", "type('Stop', (StopIteration,), {})"):
        program = f"def f(x):\n    if x == 'no':\n        raise TypeError\n    raise {raised}"
        assert outcome(tests, program) is Outcome.WRONG, raised


@pytest.mark.parametrize(
    ("expected", "raised"),
    [
        ("ValueError", "ValueError('no')"),
        ("ValueError", "type('Mine', (ValueError,), {})('no')"),
        ("UnicodeDecodeError", "UnicodeDecodeError('utf-8', b'x', 0, 1, 'no')"),
        ("Exception", "type('Mine', (Exception,), {})('no')"),
        ("KeyError", "KeyError('no')"),
    ],
)
def test_a_test_may_expect_the_exception_that_the_program_raises(expected: str, raised: str) -> None:
    test = f"def check(candidate):\n    try:\n        candidate(1)\n    except {expected}:\n        return\n"
    test += "    assert False\n"
    assert outcome({"fn_name": "f", "test": test}, f"def f(x): raise {raised}") is Outcome.CORRECT
    if expected != "Exception":
        assert outcome({"fn_name": "f", "test": test}, "def f(x): raise OSError") is not Outcome.CORRECT


def test_a_test_that_never_calls_the_function_is_the_rows_fault() -> None:
    for test in ("def check(candidate): pass", "def check(candidate):\n    assert callable(candidate)"):
        assert verify({"fn_name": "f", "test": test}, fenced(RIGHT)).outcome is Outcome.GOLD_UNPARSEABLE


def test_a_test_sees_dictionaries_in_their_order() -> None:
    test = "def check(candidate):\n    assert list(candidate(1)) == ['b', 'a']\n"
    assert outcome({"fn_name": "f", "test": test}, "def f(x): return {'b': 1, 'a': 2}") is Outcome.CORRECT


# --- what programs find ----------------------------------------------------------------------------------------------


def test_the_prelude_solves_no_task_by_itself() -> None:
    for name, arguments, value in (
        ("gcd", [4, 6], 2),
        ("comb", [4, 2], 6),
        ("mean", [[1, 3]], 2),
        ("sorted", [[1]], [1]),
    ):
        tests = {"fn_name": name, "inputs": [arguments], "outputs": [value]}
        assert outcome(tests, "pass") is Outcome.WRONG, name
        assert outcome(tests, f"def {name}(*_): return {value}") is Outcome.CORRECT, name
    assert outcome({"fn_name": "gcd", "inputs": [[4, 6]], "outputs": [2]}, "from math import gcd") is Outcome.CORRECT


NAMES = """pairwise groupby count chain islice ascii_lowercase digits log10 log2 pi inf gcd comb deepcopy
insort nlargest merge deque Counter OrderedDict cache reduce partial itemgetter xor List Optional
StringIO dumps loads mean median randint timedelta maxsize exit quit stdin bisect_left heappush
math.log itertools.zip_longest datetime.datetime statistics.mode copy.copy io.StringIO json.dumps
operator.mul random.random re.sub string.punctuation sys.maxsize collections.abc"""


def test_names_that_rows_of_livecodebench_and_leetcode_assume() -> None:
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [2]}
    lines = "\n    ".join(["def f(x):", *NAMES.split(), "return 2"])
    assert outcome(tests, lines) is Outcome.CORRECT
    script = {"fn_name": None, "inputs": ["1 2\n"], "outputs": ["3\n"]}
    assert outcome(script, "print(sum(map(int, stdin.readline().split())), file=stdout)") is Outcome.CORRECT


def test_python_s_own_names_are_python_s() -> None:
    program = "def f(x):\n    return [pow(2, 3, 5), abs(-1), sum([1]), compile('1', '', 'eval') and 1, open.__name__]"
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [[3, 1, 1, 1, "open"]]}
    assert outcome(tests, program) is Outcome.CORRECT


ENDINGS = {
    "a thread that nobody joined": "import threading, time\ndef late():\n    time.sleep(0.05)\n    print(3)\n"
    "threading.Thread(target=late).start()",
    "atexit": "import atexit\natexit.register(print, 3)",
    "atexit after an exit": "import atexit, sys\natexit.register(print, 3)\nsys.exit(1)",
    "a thread and atexit": "import atexit, threading, time\nfound = []\natexit.register(lambda: print(*found))\n"
    "threading.Thread(target=lambda: (time.sleep(0.05), found.append(3))).start()",
    "a pool that is not closed": "from concurrent.futures import ThreadPoolExecutor\n"
    "ThreadPoolExecutor(2).submit(lambda: (__import__('time').sleep(0.05), print(3)))",
    "buffers of another name": "import sys\nout = sys.stdout\nsys.stdout = sys.stderr\nout.write('3')",
    "sys.__stdout__": "import sys\nsys.__stdout__.write('3\\n')",
    "a closed output": "import sys\nprint(3)\nsys.stdout.close()",
    "files of devices": "open('/dev/stdin').read()\nopen('/dev/stdout', 'w').write('3')",
    "exit": "print(3)\nexit()",
    "an error in atexit": "import atexit\natexit.register(print, 3)\natexit.register(lambda: 1 / 0)",
    "dataclasses": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
    "class A:\n    x: int\nprint(A(3).x)",
    "its own module": "import __main__\ny = 3\nprint(__main__.y)",
}


@pytest.mark.parametrize("program", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_script_ends_as_an_interpreter_does(program: str) -> None:
    assert outcome({"fn_name": None, "inputs": [""], "outputs": ["3\n"]}, program) is Outcome.CORRECT


def test_a_daemon_does_not_hold_a_script_up_and_another_thread_does() -> None:
    hangs = "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon={}).start()\nprint(3)"
    tests = {"fn_name": None, "inputs": [""], "outputs": ["3\n"]}
    assert outcome(tests, hangs.format(True)) is Outcome.CORRECT
    assert outcome(tests, hangs.format(False)) is Outcome.TIMEOUT
