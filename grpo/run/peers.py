"""Whether the other processes of a run are still there, and what became of one that is not.

A collective hears at once of a process that died, because the kernel closes its connections; of a machine that lost
power or its network it hears nothing, and waits until its own timeout (half an hour). A process that only waits for
one that failed by itself does not learn why. So every process keeps a connection to the first one. The kernel probes
it (TCP keepalive), whatever the process is doing, and the last thing a failing process says goes through it.

The kernel answers for a process that is stopped (SIGSTOP, a debugger), too. So each process also says every few seconds
that it is there. One that says nothing may be busy in code that holds the interpreter, which is no reason to end a run:
on this machine it is looked at, and is lost if it is stopped. Of another machine only the silence is known.

``watch`` starts a thread. When it learns that a process is lost, it tells the others through the first process, and
ends its own process with exit code 1: after a while in which an error of the main thread may end it in good order, at
once where a machine is gone, because then the main thread waits in a collective. Nothing of torch is imported here.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grpo.errors import printable

SECONDS_TO_LEARN = 5.0  # between a collective's error and what this module hears of the same loss
SECONDS_TO_UNWIND = 30.0  # for the main thread, once it can know
SECONDS_TO_ARRIVE = 1.0  # for the last words of this process
SILENCES = 5  # how many times longer a process of another machine may say nothing
KEY = "grpo/peers"  # in the store of the launch: port and token of the first process


@dataclass(frozen=True)
class Loss:
    """A process that is gone: what is known of it, and the exit code of those that end with it."""

    text: str
    silent: bool = False
    """Its machine does not answer, or it is stopped, so collectives do not know of it."""
    code: int = 1


@dataclass
class _Peer:
    """The other end of a connection."""

    connection: socket.socket
    name: str
    process: int = 0
    """Its process id, where it is on this machine."""
    heard: float = field(default_factory=time.monotonic)
    said: bytes = b""

    def send(self, **message: Any) -> None:
        with suppress(OSError):  # what is lost is found by reading
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """What it said since the last call; waits for something.

        Raises:
            EOFError: its process closed the connection, or the kernel did when the process died.
            OSError: the connection broke.
            ValueError: it is not a process of this run.
        """
        chunk = self.connection.recv(1 << 16)
        if not chunk:
            raise EOFError
        self.heard = time.monotonic()
        *lines, self.said = (self.said + chunk).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not one of ours")
        return messages


class _Watch:
    """This process's connections: those of all others on the first process, else the one to the first process.

    ``parted`` is set once this process has said its last word: what becomes of the others does not concern it then.
    """

    def __init__(self, rank: int, seconds: float, patience: float):
        self.rank, self.seconds, self.patience = rank, seconds, max(patience, seconds)
        self.step = self.begun = 0  # the number of the step under way, and how many this process has begun
        self.beat = min(5.0, seconds / 6)  # seconds between two words of this process
        self.awake = self.spoke = time.monotonic()
        self.process = os.getpid()
        self.peers: list[_Peer] = []
        self.loss: Loss | None = None
        self.known = threading.Event()
        self.parted = False

    def add(self, connection: socket.socket, name: str) -> _Peer:
        _probe(connection, self.seconds)
        self.peers.append(_Peer(connection, name))
        return self.peers[-1]

    def watch_first(self) -> None:
        """The thread of every process but the first."""
        (first,) = self.peers
        waiting = selectors.DefaultSelector()
        waiting.register(first.connection, selectors.EVENT_READ)
        while True:
            for message in self._hear(first) if waiting.select(self.beat) else []:
                if "lost" in message:
                    self._end(Loss(message["lost"], message["silent"], message["code"]))
                if "ended" in message:
                    self._ended(first, message)
            self._look_after()

    def watch_others(self, listener: socket.socket, token: str) -> None:
        """The thread of the first process."""
        waiting = selectors.DefaultSelector()
        waiting.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select(self.beat):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    waiting.register(connection, selectors.EVENT_READ, self.add(connection, ""))
                    continue
                peer = key.data
                for message in self._hear(peer):
                    if message.get("token") == token:
                        peer.name, peer.process = message["name"], _process(message)
                    elif peer.name and "ended" in message:
                        self._ended(peer, message)
                if peer not in self.peers:
                    waiting.unregister(peer.connection)
                    peer.connection.close()
            self._look_after()

    def _look_after(self) -> None:
        """Say that this process is there, and see who has not said so for too long."""
        now, slept = time.monotonic(), time.monotonic() - self.awake
        self.awake = now
        if slept > 3 * self.beat:  # this process was stopped itself, or its interpreter was held
            for peer in self.peers:
                peer.heard = now
        if now - self.spoke >= self.beat:
            self.spoke = now
            for peer in self.peers:
                peer.send(alive=True)
        limit = self.seconds if self.begun > 1 else self.patience
        for peer in [peer for peer in self.peers if peer.name and now - peer.heard > limit]:
            silence = now - peer.heard
            if _is_stopped(peer.process):
                why = f"its process {peer.process} is stopped (by SIGSTOP or a debugger)"
            elif not peer.process and silence > SILENCES * limit:
                why = "its process is stopped, or hangs"
            else:
                continue
            text = f"{peer.name} was lost {self._when()}: {why} and has said nothing for {silence:.0f} s"
            self._end(Loss(text, silent=True), found_here=True)

    def _hear(self, peer: _Peer) -> list[dict[str, Any]]:
        """What a peer said. One that is lost says nothing, and the process ends."""
        try:
            return peer.read()
        except (EOFError, ConnectionResetError):
            why, silent = "its process was killed, or its machine went down", False
        except ValueError:
            why, silent, peer.name = "", False, ""  # not one of ours
        except OSError as error:
            why, silent = f"its machine has not answered for {self.seconds:g} s ({error.strerror})", True
        if peer in self.peers:
            self.peers.remove(peer)
            if peer.name:
                self._end(Loss(f"{peer.name} was lost {self._when()}: {why}", silent))
        if self.rank:
            peer.connection.close()
            sys.exit()  # this thread: there was one peer
        return []

    def _ended(self, peer: _Peer, message: dict[str, Any]) -> None:
        self.peers.remove(peer)
        if message["ended"]:
            self._end(Loss(f"{peer.name} ended {self._when()}: {message['ended']}", code=message["code"]))

    def _when(self) -> str:
        return f"in step {self.step}" if self.step else "before the first step"

    def _end(self, loss: Loss, found_here: bool = False) -> None:
        """Tell the others, let the main thread end by itself if it can, and end the process. The first process of a
        node says why; the second too, where it is the first that is lost."""
        if self.parted:
            return
        for peer in self.peers:
            peer.send(lost=loss.text, silent=loss.silent, code=loss.code)
        self.loss = loss
        self.known.set()
        if not loss.silent:
            time.sleep(SECONDS_TO_UNWIND)
            if self.parted:  # the main thread is on its way out, and says itself why
                return
        if os.environ.get("LOCAL_RANK", "0") in (("0", "1") if found_here else ("0",)):
            print(printable(f"{loss.text}\n{ADVICE}"), file=sys.stderr, flush=True)
        else:
            time.sleep(SECONDS_TO_LEARN)  # a launcher ends all of a node as soon as one ends
        _hang_up(self.peers)
        os._exit(loss.code)


ADVICE = "This process cannot go on without it. Start all of them again with --resume."

_watch: _Watch | None = None


def watch(store: Any, address: str, rank: int, world_size: int, seconds: float, patience: float = 1800.0) -> None:
    """Watch the other processes of this launch, all of which call this. Those of a machine that has not answered for
    ``seconds`` are lost, and those that are stopped for as long; before the first step is made, for ``patience``.

    ``store`` is the launch's (``set`` and ``get``), and ``address`` one at which the first process's node is reached.
    """
    global _watch
    if world_size == 1 or _watch is not None:
        return
    mine = _Watch(rank, seconds, patience)
    hello = {"name": f"rank {rank} (on {socket.gethostname()})", "machine": _machine(), "process": os.getpid()}
    if rank == 0:
        listener, token = _listen(), uuid.uuid4().hex
        store.set(KEY, json.dumps({"port": listener.getsockname()[1], "token": token, **hello}))
        listen: Callable[[], None] = partial(mine.watch_others, listener, token)
    else:
        first = json.loads(store.get(KEY))
        connection = socket.create_connection((address, first["port"]), timeout=seconds)
        connection.settimeout(None)
        peer = mine.add(connection, first["name"])
        peer.process = _process(first)
        peer.send(token=first["token"], **hello)
        listen = mine.watch_first
    _watch = mine
    atexit.register(say_ended)
    threading.Thread(target=listen, name="peers", daemon=True).start()


def at_step(step: int) -> None:
    """Say which step is under way, for messages."""
    if _watch is not None:
        _watch.step, _watch.begun = step, _watch.begun + 1


def loss() -> Loss | None:
    """After an error: the process that was lost, if that explains it. Waits a moment for the news."""
    if _watch is None:
        return None
    _watch.known.wait(SECONDS_TO_LEARN)
    return _watch.loss


def say_ended(why: str = "", code: int = 1) -> None:
    """The last thing this process says to the others: why it fails, or nothing if it has done what it should."""
    if _watch is None or _watch.parted or _watch.process != os.getpid():  # a fork of it has nothing to say
        return
    _watch.parted = True
    peers = list(_watch.peers)
    for peer in peers:
        peer.send(ended=why, code=code)
    _hang_up(peers)


def _hang_up(peers: list[_Peer]) -> None:
    """Wait for the others to hang up, and read what they still say. A process that ends with something unread resets
    its connections, and its last words may be lost with that: the others would take it for killed."""
    waiting, until = selectors.DefaultSelector(), time.monotonic() + SECONDS_TO_ARRIVE
    with suppress(OSError, ValueError, KeyError):  # the watching thread may close a connection meanwhile
        for peer in peers:
            with suppress(OSError):
                peer.connection.shutdown(socket.SHUT_WR)
                waiting.register(peer.connection, selectors.EVENT_READ)
        while waiting.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                try:
                    said = key.fileobj.recv(1 << 16, socket.MSG_DONTWAIT)  # type: ignore[union-attr]
                except BlockingIOError:
                    continue  # the watching thread has read it
                except OSError:
                    said = b""
                if not said:
                    waiting.unregister(key.fileobj)


def _machine() -> str:
    """What processes that see each other's numbers have in common."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip() + os.readlink("/proc/self/ns/pid")
    return ""


def _process(hello: dict[str, Any]) -> int:
    """The process id in what a process says of itself; 0 where it is on another machine."""
    return hello["process"] if hello.get("machine") and hello["machine"] == _machine() else 0


def _is_stopped(process: int) -> bool:
    with suppress(OSError), open(f"/proc/{process}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _probe(connection: socket.socket, seconds: float) -> None:
    """Have the kernel break a connection whose other end has not answered for ``seconds``."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", max(1, round(seconds / 2))),  # of silence, before the first probe
        ("TCP_KEEPINTVL", max(1, round(seconds / 6))),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", round(1000 * seconds)),  # for what is being sent, which is not probed
    ):
        if hasattr(socket, option):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
