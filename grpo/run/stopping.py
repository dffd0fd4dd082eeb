"""A request to stop, from the command's first moment to its last: SIGTERM, SIGUSR1 (Slurm's early warning), SIGHUP
(the terminal is gone), unless ``nohup`` has it ignored, or Ctrl-C. A batch script may ignore SIGUSR1: for itself, not
for the run.

A step under way is finished and saved first: the loop asks whether there was a request (``asked``). Before the first
step and after the last one there is nothing to save, and Preempted is raised wherever the main thread is (of Ctrl-C,
KeyboardInterrupt). A second Ctrl-C raises KeyboardInterrupt within a step too, and the run saves what it can.

The main thread may be in C code, waiting for processes that never come. A thread then ends the process after a while.
Nothing of torch is imported here: the command listens before anything else.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from grpo.errors import Preempted
from grpo.run import peers

log = logging.getLogger("grpo")

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
CODES = dict.fromkeys(REQUESTS, 143) | {signal.SIGINT: 130}
SECONDS_TO_UNWIND = 10.0  # for the main thread to end in good order
SECONDS_TO_HEAR = 0.5  # it may hear of a signal before the thread does
BEFORE = "asked to stop before the first step: there is nothing new to save; start again with --resume"
AFTER = "asked to stop after the last step, which is saved; start again with --resume for final/ and the report"
NOW = "stopped by Ctrl-C; what came after the last checkpoint, if there is one, is not saved"
PRESSED = "Ctrl-C: this step is finished and saved, then the run ends; press it again to end now"
WHY = {143: "asked to stop", 130: "stopped by Ctrl-C"}  # of exit codes

_process: int | None = None  # that listens; a fork of it does not
_listened = 0  # how often it has begun to
_asked = False
_at_once: str | None = BEFORE  # what is said if asked now; None while the loop asks between two steps
_code = 143  # the exit code of the first request
_pressed = False  # Ctrl-C, within the steps
_heard = 0.0  # when the main thread last heard of a signal (time.monotonic)


@contextmanager
def listening() -> Iterator[None]:
    """Within it requests are heard. Inside of another one, and outside of the main thread, it does nothing."""
    global _process, _asked, _at_once, _listened, _code, _pressed
    if _process == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    _process, _asked, _at_once, _code, _pressed = os.getpid(), False, BEFORE, 143, False
    _listened += 1
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    heard = [number for number in REQUESTS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in the background of a script
        heard.append(signal.SIGINT)
    previous = {number: signal.signal(number, _hear) for number in heard}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading, _listened), name="stopping", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(writing)  # which ends the thread
        _process = None


def asked() -> bool:
    return _asked


def code() -> int:
    """The exit code of a run that ends because it was asked to: 130 after Ctrl-C, else 143."""
    return _code


def wait_for_steps() -> None:
    """From now on the loop asks, or saves what it can."""
    global _at_once
    _at_once = None


def wait_no_more() -> None:
    """The last step is made and saved."""
    global _at_once
    _at_once = AFTER


def _hear(number: int, _: FrameType | None) -> None:
    global _asked, _at_once, _code, _pressed, _heard
    if os.getpid() != _process:  # a fork has nothing to save
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    before, _asked, _heard = _asked, True, time.monotonic()
    if not before:
        _code = CODES[signal.Signals(number)]
    if number == signal.SIGINT:
        again, _pressed = _pressed, True
        if _at_once is None and not again:
            return
        _at_once = _at_once or NOW
        raise KeyboardInterrupt
    if _at_once is not None and not before:  # once: it may be unwinding
        peers.say_ended(_at_once, code=143)
        raise Preempted(_at_once)


def _watch(reading: int, listened: int) -> None:
    """The thread. Python writes the number of each signal, also while the main thread is in C code."""
    pressed = False
    while number := os.read(reading, 1):
        if number[0] not in CODES:
            continue
        at_once = _at_once
        if at_once is None and number[0] != signal.SIGINT:
            continue
        if at_once is None and not pressed:
            pressed = True
            log.warning(PRESSED)
            continue
        came = time.monotonic()
        time.sleep(SECONDS_TO_UNWIND)
        # The main thread did not hear it yet, or it is still unwinding; else it may be saving what it can.
        stuck = _heard < came - SECONDS_TO_HEAR or _at_once is not None
        if stuck and _process == os.getpid() and _listened == listened:
            why = _at_once or NOW
            peers.say_ended(why, code=CODES[signal.Signals(number[0])])
            print(why, file=sys.stderr, flush=True)
            os._exit(CODES[signal.Signals(number[0])])
    os.close(reading)


def _forget() -> None:
    """A fork's signals are not this process's."""
    if _process is not None:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
