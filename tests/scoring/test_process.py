"""One worker from the trainer's end: whatever becomes of it, a job ends in time with an outcome for every request."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from grpo.scoring import process as process_module
from grpo.scoring.messages import Answer, Failure, Job, Outcome, Request
from grpo.scoring.process import FunctionsNotLoaded, WorkerFailed, WorkerProcess
from grpo.scoring.worker import Setup
from tests.scoring.helpers import SHORT, alive, spec_of, wait_until

ROW = pickle.dumps(("p", {}))


@contextmanager
def worker_of(function: str) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(Setup([spec_of(function)], 2**29, 0))
    try:
        worker.start()
        yield worker
    finally:
        worker.close()


def run(worker: WorkerProcess, *completions: str, timeout: float = 20.0) -> list[Outcome]:
    """A request for each completion."""
    requests = [Request(ROW, [text], [[1]], ["stop"], "") for text in completions]
    return worker.run(pickle.dumps(Job(0, 1, requests)), len(requests), timeout)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("exits", "the worker exited with status 0"),
        ("segfault", "the worker was killed by SIGSEGV\nFatal Python error: Segmentation fault"),
        ("killed", r"the worker was killed by SIGKILL \(out of memory\?\)"),
        ("killed_by_an_odd_signal", "the worker was killed by signal 40"),
        ("killed_while_it_answers", "the worker was killed by SIGKILL"),
        ("closes_files", "the worker exited with status 0"),
        ("takes_the_pipe", "the worker exited with status 0"),
        ("says_what_is_no_message", "the worker sent b'hello', which is no message"),
        ("answers_another_call", "the worker sent .*, which answers no request"),
        ("program_holds_the_pipe", "the worker was killed by SIGKILL"),
        ("fork_holds_the_pipe", "the worker was killed by SIGKILL"),
    ],
)
def test_a_worker_that_ends_at_work_is_replaced(function, said):
    with worker_of(function) as worker:
        first = worker.pid
        answered, crashed, untried = run(worker, "a", "bad", "b")
        assert answered == Answer([1.0])
        assert isinstance(crashed, Failure)
        assert (crashed.cause, crashed.lost) == ("crashed", True)
        assert re.match(said, crashed.message)
        assert untried == crashed
        assert worker.pid != first
        assert not alive(first)
        assert run(worker, "aaa") == [Answer([3.0])]


@pytest.mark.parametrize(("function", "where"), [("loops", "forever"), ("power_tower", "power_tower"), ("stops", "")])
def test_a_worker_that_is_silent_is_replaced(function, where):
    with worker_of(function) as worker:
        first = worker.pid
        answered, late = run(worker, "a", "bad", timeout=SHORT)
        assert answered == Answer([1.0])
        assert isinstance(late, Failure)
        assert (late.cause, late.lost) == ("timeout", True)
        assert late.message.startswith(f"no result after {SHORT:g} s")
        assert where in late.message
        assert "grpo/scoring" not in late.message
        assert not alive(first)
        assert run(worker, "aaa") == [Answer([3.0])]


def test_a_worker_that_stops_in_the_middle_of_an_answer_does_not_stop_the_trainer(monkeypatch):
    monkeypatch.setattr(process_module, "STALL_TIMEOUT", 0.2)
    with worker_of("stops_while_it_answers") as worker:
        (stalled,) = run(worker, "bad")
        assert isinstance(stalled, Failure)
        assert stalled.message.startswith("the worker neither read nor wrote its pipe for 0.2 s")
        assert run(worker, "aaa") == [Answer([3.0])]


def test_a_stopped_worker_that_takes_no_job_does_not_stop_the_trainer(monkeypatch):
    monkeypatch.setattr(process_module, "STALL_TIMEOUT", 0.2)
    with worker_of("length") as worker:
        os.kill(worker.pid, signal.SIGSTOP)
        (stalled,) = run(worker, "x" * 2**22)  # more than the pipe holds
        assert isinstance(stalled, Failure)
        assert stalled.cause == "crashed"
        assert run(worker, "aaa") == [Answer([3.0])]


def test_a_large_answer_arrives_whole():
    with worker_of("large") as worker:
        started = time.monotonic()
        outcomes = run(worker, "a", "bb")
        assert time.monotonic() - started < 10
        first = worker.pid
        assert [outcome.rewards for outcome in outcomes] == [[1.0], [2.0]]
        assert [len(outcome.columns["large"][0]) for outcome in outcomes] == [10_000_000] * 2
        assert worker.pid == first


def test_what_cannot_be_written_as_json_is_a_failure_and_not_the_end():
    with worker_of("logs_an_endless_integer") as worker:
        first = worker.pid
        answer, failure = run(worker, "a", "bad")
        assert answer == Answer([1.0], columns={"n": [1.0]})
        assert isinstance(failure, Failure)
        assert failure.message.startswith("what it logged cannot be written as JSON: ValueError: Exceeds the limit")
        assert worker.pid == first


def test_after_a_memory_error_the_worker_is_replaced():
    with worker_of("memory") as worker:
        first = worker.pid
        (failure,) = run(worker, "bad")
        assert isinstance(failure, Failure)
        assert (failure.cause, failure.lost) == ("error", False)
        assert worker.pid != first


def test_a_worker_killed_while_idle_costs_nothing():
    with worker_of("length") as worker:
        first = worker.pid
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: not alive(first))
        assert run(worker, "aaa") == [Answer([3.0])]
        assert worker.pid != first


def test_functions_that_are_not_loaded_are_told_apart(tmp_path):
    (tmp_path / "a.py").write_text("1/0\n")
    worker = WorkerProcess(Setup([spec_of("length"), spec_of("fn", tmp_path / "a.py")], None, 0))
    with pytest.raises(FunctionsNotLoaded) as failure:
        worker.start()
    worker.close()
    assert failure.value.causes[0] is None
    assert "ZeroDivisionError" in failure.value.causes[1]


def test_no_room_for_a_process_is_told(monkeypatch):
    with worker_of("length") as worker:
        monkeypatch.setattr("sys.executable", "/no/such/python")
        with pytest.raises(WorkerFailed, match=r"cannot start a process: .*No such file"):
            worker.restart()
        monkeypatch.undo()
        assert run(worker, "aaa") == [Answer([3.0])]


def test_a_closed_worker_does_not_come_back():
    with worker_of("length") as worker:
        pid = worker.pid
        worker.close()
        worker.close()
        assert not alive(pid)
        with pytest.raises(WorkerFailed, match="closed"):
            run(worker, "a")


def test_a_worker_is_ours_whatever_is_first_on_the_path(tmp_path, monkeypatch):
    for name in ("grpo", "rewards"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')")
    monkeypatch.syspath_prepend(tmp_path)
    with worker_of("length") as worker:
        assert run(worker, "aaa") == [Answer([3.0])]
