"""The nursery of the sandbox: its places are as tight as others, need no interpreter, and end with their owner."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from rewards import code_workers
from rewards.sandbox import Limits, PackageRefused, Sandbox, Session
from rewards.sandbox.nursery import Nursery
from rewards.sandbox.packages import Packages
from rewards.sandbox.probe import attacked
from tests.rewards.test_sandbox import works

LIMITS = Limits(5.0, 256, 1000)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def places(nursery: Nursery) -> list[psutil.Process]:
    return psutil.Process(nursery._process.pid).children(recursive=True)


def wait_for_none(nursery: Nursery) -> None:
    end = time.monotonic() + 10
    while places(nursery):
        assert time.monotonic() < end, places(nursery)
        time.sleep(0.02)


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_its_places_withstand_the_attacks_and_end_when_they_are_closed(level: str, nursery: Nursery) -> None:
    if not works(level):
        pytest.skip(f"{level} does not work on this machine")
    with Sandbox(1, level, Packages(), nursery) as sandbox:
        assert attacked(sandbox) == []
        assert sandbox.pids == []
        assert places(nursery)
    wait_for_none(nursery)


def test_a_place_that_has_ended_is_followed_by_another(nursery: Nursery) -> None:
    with Sandbox(1, "unsafe", Packages(), nursery) as sandbox:
        session = Session(sandbox, LIMITS)
        assert session.run("1 + 1").output == "2\n"
        session.close()
        (place,) = psutil.Process(nursery._process.pid).children()
        place.kill()
        end = time.monotonic() + 10
        while place.is_running():
            assert time.monotonic() < end
        assert session.run("2 + 2").output == "4\n"
        session.close()
    wait_for_none(nursery)


def test_a_package_that_it_does_not_have_is_told(nursery: Nursery) -> None:
    with pytest.raises(PackageRefused, match="no_such_package cannot be imported in the sandbox"):
        Sandbox(1, "unsafe", Packages(("no_such_package",)), nursery)


@pytest.fixture
def prepared() -> Iterator[Nursery]:
    code_workers.stop()
    before = dict(code_workers.settings)
    code_workers.prepare(allow_unsafe=True)
    assert code_workers.prepared is not None
    nursery = code_workers.prepared[1]
    if nursery is None:
        pytest.skip("bubblewrap starts places itself")
    yield nursery
    nursery.close()
    code_workers.prepared = None
    code_workers.settings.update(before)


def in_a_fork(pipe: int) -> None:
    """An episode: it opens a session, says what that said, and waits to be killed."""
    code_workers.start(1)
    said = Session(code_workers.programs_of(), LIMITS).run("6 * 7").output
    os.write(pipe, said.encode())
    time.sleep(60)


def test_forked_processes_open_sessions_without_an_interpreter_of_their_own_which_end_with_them(
    prepared: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an interpreter was started")

    monkeypatch.setattr("rewards.sandbox.pool.start_place", refuse)
    episodes = []
    for _ in range(8):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                in_a_fork(write)
            os._exit(1)
        os.close(write)
        episodes.append((pid, read))
    try:
        assert [os.read(read, 10) for _, read in episodes] == [b"42\n"] * 8
        assert len(places(prepared)) >= 8
    finally:
        for pid, read in episodes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(read)
    wait_for_none(prepared)


def test_where_the_nursery_has_ended_places_start_without_it(
    prepared: Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    prepared.close()
    code_workers.start(1)
    try:
        assert Session(code_workers.programs_of(), LIMITS).run("6 * 7").output == "42\n"
    finally:
        code_workers.stop()
    assert "the nursery of the sandbox has ended" in caplog.text
