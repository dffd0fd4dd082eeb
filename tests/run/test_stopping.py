"""Requests to stop: at once before and after the steps, between two of them otherwise; never a fork's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from grpo.errors import Preempted
from grpo.run import stopping
from tests.launching import environment


def ask(number: int = signal.SIGUSR1) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_before_and_after_the_steps_it_is_raised_at_once_and_within_them_it_waits(number) -> None:
    before = signal.getsignal(number)
    with stopping.listening():
        with pytest.raises(Preempted, match="before the first step"):
            ask(number)
        assert stopping.asked()
    with stopping.listening():
        stopping.wait_for_steps()
        ask(number)
        assert stopping.asked()
        with stopping.listening():  # of the run, inside of the command's
            assert stopping.asked()
    with stopping.listening():
        assert not stopping.asked()
        stopping.wait_for_steps()
        stopping.wait_no_more()
        with pytest.raises(Preempted, match="after the last step, which is saved"):
            ask(number)
    assert signal.getsignal(number) == before


def test_ctrl_c_within_the_steps_waits_once_and_is_said_and_raises_the_second_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with stopping.listening(), pytest.raises(KeyboardInterrupt):
        ask(signal.SIGINT)  # before the first step
    with stopping.listening(), caplog.at_level("WARNING", "grpo"):
        stopping.wait_for_steps()
        ask(signal.SIGINT)
        assert stopping.asked()
        assert stopping.code() == 130
        deadline = time.monotonic() + 5
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)  # another thread says it
        assert caplog.messages == [stopping.PRESSED]
        with pytest.raises(KeyboardInterrupt):
            ask(signal.SIGINT)
        stopping.wait_for_steps()  # the run saves what it can
        with pytest.raises(KeyboardInterrupt):
            ask(signal.SIGINT)
    with stopping.listening():
        stopping.wait_for_steps()
        ask(signal.SIGTERM)
        ask(signal.SIGINT)
        assert stopping.code() == 143, "the first request counts"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_is_ignored_or_another_s_stays_so() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.SIG_IGN, lambda *_: None):
            signal.signal(signal.SIGINT, handler)
            with stopping.listening():
                assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_under_nohup_the_end_of_the_terminal_is_no_request_but_what_a_batch_script_ignores_is() -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGUSR1)}
    try:
        with stopping.listening():
            ask(signal.SIGHUP)
            assert not stopping.asked()
            with pytest.raises(Preempted):
                ask(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_catches_exceptions_does_not_catch_it_and_a_second_request_does_not_disturb_its_end() -> None:
    ended = []

    def tries() -> None:
        try:
            ask()
        except Exception:  # a library that tries an import
            pytest.fail("caught")
        finally:
            ask()
            ended.append("in good order")

    with stopping.listening(), pytest.raises(Preempted):
        tries()
    assert ended


def test_another_thread_does_not_listen() -> None:
    found = []

    def listen() -> None:
        with stopping.listening():
            found.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGUSR1)] == [signal.SIG_DFL]


SCRIPT = """
    import ctypes, os, signal, sys, threading, time
    from grpo.run import stopping
    stopping.SECONDS_TO_UNWIND = 0.2
    with stopping.listening():
        if not (child := os.fork()):
            os.kill(os.getpid(), signal.SIGTERM)  # the fork's own
            time.sleep(20)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.5)
        print("not asked" if not stopping.asked() else "asked", flush=True)
        number, moments = int(sys.argv[1]), [0.3]
        if sys.argv[2] == "within the steps":
            stopping.wait_for_steps()
            moments = [0.3, 0.6]
        for moment in moments:
            threading.Timer(moment, lambda: os.kill(os.getpid(), number)).start()
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)  # the second time for ever; no signal interrupts it
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "when", "says"),
    [
        (signal.SIGUSR1, 143, "before", "asked to stop before the first step"),
        (signal.SIGINT, 130, "before", "asked to stop before the first step"),
        (signal.SIGINT, 130, "within the steps", "press it again to end now\nstopped by Ctrl-C"),
    ],
)
def test_a_main_thread_that_waits_in_c_code_is_ended_and_a_forks_signals_are_its_own(number, code, when, says) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(int(number)), when],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "not asked\n"), done.stderr
    assert says in done.stderr
