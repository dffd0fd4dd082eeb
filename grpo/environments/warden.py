"""One thread that speaks with all episodes' processes, and ends those that are late, fat or many.

What it is asked to do comes as orders from other threads; it alone touches sockets and calls. A call's future always
ends: with what the process answered, or with ``EpisodeFailed``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from grpo.environments import messages
from grpo.environments.living import Call, EpisodeFailed, Living
from grpo.environments.watch import too_much

log = logging.getLogger(__name__)

ENDING = 8.0  # seconds for a killed episode to be gone, with all that it has started
FORKING = 60.0  # seconds for a process to be forked; the zygote does so one after the other
CLOSING = 2.0  # seconds in which one that is over may tidy up
WATCH = 0.25  # seconds between looks at what long calls have started
MAX_MESSAGE = 1 << 17
UNTOLD = "the episode's process"  # the message of a failure until it is known how the process ended


class Warden:
    """``begin``, ``ask`` and ``end`` return at once and may be called from any thread."""

    def __init__(self, memory_bytes: int | None) -> None:
        self._memory_bytes = memory_bytes
        self._living: dict[int, Living] = {}
        self._control: socket.socket | None = None
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._watch_at = 0.0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="environments", daemon=True)
        self._thread.start()

    # --- for any thread

    @property
    def has_zygote(self) -> bool:
        return self._control is not None

    def take(self, control: socket.socket) -> None:
        """From now on, episodes are forked by the zygote at the other end of ``control``."""

        def register() -> None:
            self._selector.register(control, selectors.EVENT_READ, control)

        self._control = control
        self._do(register)

    def begin(self, number: int, seed: int, timeout: float) -> Living:
        """Have an episode's process forked."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        living = Living(number, ours, timeout)
        self._do(lambda: self._begin(living, seed, theirs))
        return living

    def ask(self, living: Living, what: str, argument: Any) -> Future[Any]:
        called = ", ".join(name for name, _ in argument) if what == "call" else what
        call = Call(called, messages.request(what, argument))
        self._do(lambda: self._ask(living, call))
        return call.future

    def end(self, living: Living) -> None:
        """An episode is over: its process may tidy up for a moment. May be called twice."""
        self._do(lambda: self._close(living))

    def stop(self) -> None:
        """End the thread. Calls that are not answered fail. May be called twice."""
        if not self._stopped:
            self._do(self._stop)
            self._thread.join()

    def _do(self, order: Callable[[], None]) -> None:
        self._orders.put(order)
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake.send(b"!")
        if self._stopped:  # nobody else would, and those who wait must be told
            self._obey()

    def _obey(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._orders.get_nowait()()

    # --- in the thread

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._turn()
            except Exception:  # a bug; those who wait must not wait for ever
                log.exception("environments")
                for living in list(self._living.values()):
                    self._gone(living, "is lost: see the log")
        self._obey()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._patience()):
            if key.fileobj is self._woken:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(1 << 16)
            elif isinstance(key.data, Living):
                self._serve(key.data, events)
            else:
                self._hear()
        self._obey()
        self._look_at_clock()

    def _patience(self) -> float | None:
        times = [living.deadline for living in self._living.values() if living.deadline is not None]
        if not times:
            return None
        return min(max(0.0, min(times) - time.monotonic()), WATCH)

    def _begin(self, living: Living, seed: int, theirs: socket.socket) -> None:
        self._living[living.number] = living
        with theirs:
            data = json.dumps({"number": living.number, "seed": seed}).encode()
            if self._control is None:
                self._gone(living, "cannot be started: the process that episodes are forked from has ended")
                return
            try:
                socket.send_fds(self._control, [data], [theirs.fileno()])
            except OSError as why:
                self._gone(living, f"cannot be started: {why}")
                return
        self._listen(living)

    def _ask(self, living: Living, call: Call) -> None:
        if living.failure is not None or living.number not in self._living:
            call.future.set_exception(living.failure or EpisodeFailed("crashed", "the episode is over"))
            return
        living.calls.append(call)
        if len(living.calls) == 1:
            self._send(living)

    def _send(self, living: Living) -> None:
        """Begin the first call: its clock ticks from now on."""
        living.unsent = living.calls[0].data
        self._wind(living)
        self._write(living)

    def _wind(self, living: Living) -> None:
        """Start the clock of the call under way. Before the process is there, it is the clock of its fork."""
        living.began = time.monotonic()
        living.deadline = living.began + (living.timeout if living.guard else FORKING)

    def _write(self, living: Living) -> None:
        try:
            while living.unsent:
                living.unsent = living.unsent[living.channel.send(living.unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # it has closed its end; that it has ended is reported
            living.unsent = b""
        self._listen(living)

    def _listen(self, living: Living) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if living.unsent else 0)
        if not living.listens:
            self._selector.register(living.channel, events, living)
            living.listens = True
        elif self._selector.get_key(living.channel).events != events:
            self._selector.modify(living.channel, events, living)

    def _deafen(self, living: Living) -> None:
        if living.listens:
            self._selector.unregister(living.channel)
            living.listens = False

    def _serve(self, living: Living, events: int) -> None:
        """Take in what an episode says, or go on with what it is told."""
        if not living.listens:
            return
        if events & selectors.EVENT_WRITE:
            self._write(living)
        if not events & selectors.EVENT_READ:
            return
        try:
            data = living.channel.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # it has ended, or is about to: the zygote will tell how
            self._deafen(living)
            living.deadline = time.monotonic() + ENDING
            if living.failure is None and not living.closing:
                self._fail(living, EpisodeFailed("crashed", UNTOLD), dump=False)
            return
        living.received += data
        try:
            while (answer := messages.take_answer(living.received)) is not None:
                self._answered(living, answer)
        except messages.Garbled as why:
            self._fail(living, EpisodeFailed("crashed", str(why)), dump=False)

    def _answered(self, living: Living, answer: dict[str, Any]) -> None:
        if living.failure is not None:
            return
        if not living.calls:
            raise messages.Garbled("it answered what nobody asked")
        if "failure" in answer:
            why = EpisodeFailed(str(answer["failure"]), str(answer.get("message", "")))
            self._fail(living, why, dump=False)
            self._settle(living)
            return
        call = living.calls.popleft()
        living.deadline = None
        if living.calls:
            self._send(living)
        call.future.set_result(answer["ok"])

    def _fail(self, living: Living, why: EpisodeFailed, *, dump: bool) -> None:
        """The episode is lost. Its process is ended; then those who wait are told, with what it wrote of its end."""
        if living.failure is None:
            living.failure = why
            living.deadline = time.monotonic() + ENDING
            self._tell_to_kill(living, dump=dump)

    def _tell_to_kill(self, living: Living, *, dump: bool) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(json.dumps({"number": living.number, "dump": dump}).encode())

    def _settle(self, living: Living) -> None:
        """Tell all who wait that the episode has failed."""
        while living.calls:
            living.calls.popleft().future.set_exception(living.failure)

    def _close(self, living: Living) -> None:
        if living.number in self._living and not living.closing and living.failure is None:
            living.closing = True
            living.deadline = time.monotonic() + CLOSING
            with contextlib.suppress(OSError):
                living.channel.shutdown(socket.SHUT_WR)

    def _hear(self) -> None:
        """Take in what the zygote says."""
        assert self._control is not None
        try:
            data = self._control.recv(MAX_MESSAGE)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(self._control)
            self._control.close()
            self._control = None
            for living in list(self._living.values()):
                self._gone(living, "has ended with the process that episodes are forked from")
            return
        said = json.loads(data)
        living_or_none = self._living.get(said.get("begun") or said.get("ended"))
        if living_or_none is None:
            return
        if "begun" in said:
            living_or_none.guard = said["guard"]
            if living_or_none.calls and living_or_none.failure is None:
                self._wind(living_or_none)
        else:
            self._drain(living_or_none)
            self._gone(living_or_none, said["how"], _without_ours(said["stacks"]))

    def _drain(self, living: Living) -> None:
        """What an episode said before it ended still counts."""
        while living.listens and living.failure is None:
            before = len(living.received), len(living.calls)
            self._serve(living, selectors.EVENT_READ)
            if before == (len(living.received), len(living.calls)):
                break

    def _gone(self, living: Living, how: str, stacks: str = "") -> None:
        """An episode's process is no more."""
        if self._living.pop(living.number, None) is None:
            return
        self._deafen(living)
        living.channel.close()
        living.deadline = None
        if living.failure is None or str(living.failure) == UNTOLD:
            living.failure = EpisodeFailed("crashed", f"{UNTOLD} {how}\n{stacks}".strip())
        elif living.failure.cause == "timeout":
            living.failure = EpisodeFailed("timeout", f"{living.failure}\n{stacks}".strip())
        self._settle(living)

    # --- the clock

    def _watched(self) -> list[Living]:
        """Episodes whose call takes long."""
        early = time.monotonic() - WATCH
        return [w for w in self._living.values() if w.calls and w.failure is None and w.guard and w.began < early]

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        for living in list(self._living.values()):
            if living.deadline is None or living.deadline > now:
                continue
            if living.failure is not None:
                self._gone(living, "cannot be ended")
            elif living.closing:
                living.failure = EpisodeFailed("crashed", "the episode is over")
                living.deadline = now + ENDING
                self._tell_to_kill(living, dump=False)
            else:
                what = f"{living.calls[0].what}: no answer after environment.timeout = {living.timeout:g} s"
                self._fail(living, EpisodeFailed("timeout", what), dump=True)
        if now >= self._watch_at:
            self._watch_at = now + WATCH
            for living in self._watched():
                assert living.guard is not None
                if why := too_much(living.guard, self._memory_bytes):
                    self._fail(living, EpisodeFailed(*why), dump=False)

    def _stop(self) -> None:
        self._stopped = True
        for living in list(self._living.values()):
            self._gone(living, "was ended with the run")
        self._selector.close()
        for end in (self._woken, self._wake, self._control):
            if end is not None:
                end.close()
        self._control = None


def _without_ours(stacks: str) -> str:
    """A stack dump without the lines of our own files."""
    ours = os.path.dirname(__file__)
    return "\n".join(line for line in stacks.splitlines() if ours not in line and '"<string>"' not in line)
