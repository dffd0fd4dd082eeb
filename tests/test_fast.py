"""`make test-fast` stays fast: a test that takes long and is not marked fails there."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import tests.conftest as shared


def work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def work_in_a_child(seconds: float) -> None:
    end = f"import time\nwhile time.process_time() < {seconds}: pass"
    subprocess.run([sys.executable, "-c", end], check=True)


@pytest.mark.parametrize("work", [work, work_in_a_child])
def test_a_slow_test_that_is_not_marked_fails(work):
    def call(expression: str) -> None:
        item = SimpleNamespace(config=SimpleNamespace(option=SimpleNamespace(markexpr=expression)))
        hook = shared.pytest_runtest_call(item)
        next(hook)
        work(0.25)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared, "LONGEST_FAST_TEST", 0.2)
            with pytest.raises(StopIteration):
                hook.send(None)

    with pytest.raises(pytest.fail.Exception, match=r"took 0\.\d s of CPU time: mark it @pytest.mark.slow"):
        call("not slow")
    call("")


def test_waiting_for_others_is_no_work():
    before = shared.cpu_seconds()
    time.sleep(0.3)
    assert shared.cpu_seconds() - before < 0.2
