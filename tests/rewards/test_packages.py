"""Packages that programs may import by permission: they are there, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rewards import code
from rewards.code import verify
from rewards.code_workers import judges_of, programs_of
from rewards.sandbox import Limits, PackageRefused, Sandbox, SandboxUnavailable
from rewards.sandbox.packages import find_packages
from rewards.sandbox.pool import LEVELS
from rewards.verdict import Outcome

NAMES = ("numpy", "sortedcontainers")
TESTS = {"fn_name": "f", "inputs": [[1]], "outputs": [2]}
OK = "\ndef f(x): return x + 1"
SITE = "import numpy, os\nsite = os.path.dirname(os.path.dirname(numpy.__file__))\n"
PROGRAMS = {
    "import numpy as np\ndef f(x): return int(np.linalg.det(np.eye(2))) + 1": {"correct"},
    "import numpy as np\ndef f(x): return np.array([x]).sum() + 1": {"correct"},
    "import numpy as np\ndef f(x): return np.array([x])[0] + 1.0": {"wrong"},
    "import numpy as np\ndef f(x): return np.array(2)": {"wrong"},
    "import numpy.testing, numpy.polynomial.chebyshev" + OK: {"correct"},
    "def f(x): return SortedList([3, 2])[0]": {"correct"},
    "import pandas" + OK: {"wrong", "denied"},
    "import typer" + OK: {"wrong", "denied"},
    SITE + "os.listdir(site)" + OK: {"denied"},
    SITE + "open(site + '/typer/__init__.py').read()" + OK: {"denied"},
    SITE + "open(numpy.__file__, 'a')" + OK: {"denied"},
    SITE + "open(os.path.dirname(numpy.__file__) + '/new', 'w')" + OK: {"denied"},
    SITE + "os.chmod(numpy.__file__, 0o777)" + OK: {"denied"},
    SITE + "os.remove(numpy.__file__)" + OK: {"denied"},
    "import numpy\nnumpy.save('/tmp/attack.npy', numpy.eye(2))" + OK: {"denied"},
    "import numpy\nnumpy.memmap('/tmp/attack', mode='w+', shape=9)" + OK: {"denied"},
    "import numpy\nnumpy.fromfile('/etc/passwd')" + OK: {"denied"},
}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        sandbox = Sandbox(1, request.param, find_packages(NAMES))
    except SandboxUnavailable:
        pytest.skip(f"{request.param} does not work on this machine")
    code.stop()
    code._open[programs_of, NAMES] = code._open[judges_of, NAMES] = sandbox
    yield request.param
    code.stop()


def test_packages_can_be_imported_and_only_read(level: str) -> None:
    for program, outcomes in PROGRAMS.items():
        found = verify(TESTS, f"```python\n{program}\n```", packages=NAMES, limits=Limits(5.0))
        assert found.outcome.value in outcomes, (program, found)


def test_without_permission_there_are_none() -> None:
    for program in ("import numpy" + OK, "def f(x): return SortedList([2])[0]"):
        assert verify(TESTS, f"```python\n{program}\n```").outcome is Outcome.WRONG
    code.stop()


def test_chance_is_the_same_in_every_run() -> None:
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [0.5488135039273248]}
    program = "import numpy\ndef f(x): return numpy.random.rand()"
    for _ in range(2):
        found = verify(tests, f"```python\n{program}\n```", packages=["numpy"])
        assert found.outcome is Outcome.CORRECT, found
    code.stop()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["no_such_package"], "there is no package 'no_such_package'"),
        (["../../etc"], "there is no package"),
        (["pandas"], "pandas cannot be imported .* must name what a package imports"),
        ("numpy", r"expected a list of names, such as \[numpy"),
        ([1], "expected a list of names"),
    ],
)
def test_a_package_that_cannot_be_had_is_refused_at_the_start(names: list, message: str) -> None:
    with pytest.raises(PackageRefused, match=message):
        code.start(1, packages=names)
    code.stop()


def test_names_of_the_standard_library_need_no_permission() -> None:
    assert find_packages(["os", "json"]).paths == ()
