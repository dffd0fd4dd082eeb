"""What the processes of a launch learn of one that is gone. Those that stay wait, as they would in a collective."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launching import environment

PROCESS = """
import os, signal, sys, time
from pathlib import Path
from grpo.run import peers

class Store:  # as c10d's: get waits for the key
    folder = Path(sys.argv[1])
    def set(self, key, value):
        (self.folder / "writing").write_text(value)
        (self.folder / "writing").rename(self.folder / "key")
    def get(self, key):
        while not (self.folder / "key").exists():
            time.sleep(0.01)
        return (self.folder / "key").read_bytes()

rank, does = int(sys.argv[2]), sys.argv[3]
peers.SECONDS_TO_UNWIND = peers.SECONDS_TO_LEARN = 0.2
seconds, step = (float(text) for text in sys.argv[4:] or (60, 7))
peers.watch(Store(), "127.0.0.1", rank, 3, seconds)
for number in range(int(step) - 1, int(step) + 1):
    if number:
        peers.at_step(number)
(Store.folder / f"ready_{rank}").touch()
while len(list(Store.folder.glob("ready_*"))) < 3:
    time.sleep(0.01)
time.sleep(0.1)
if does == "stops":
    os.kill(os.getpid(), signal.SIGSTOP)
if does == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if does == "forks" and os.fork() == 0:
    sys.exit()
if does == "forks":
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
if does == "fails":
    peers.say_ended("OutOfMemoryError: 80 GB are\x1b[31m not enough", code=4)
if does == "raises":
    peers.SECONDS_TO_LEARN = 2
    try:
        time.sleep(0.3)
        raise RuntimeError("Connection closed by peer")
    except RuntimeError:
        print(peers.loss().text, file=sys.stderr)
        sys.exit(1)
if does == "waits":
    time.sleep(20)
"""

STRANGER = r"""
import json, socket
port = json.loads(Store().get(""))["port"]
for words in (b"1\n", b"GET / HTTP/1.1\r\n\r\n", b'{"token": "guessed"}\n{"ended": "hello", "code": 1}\n'):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(words)
    time.sleep(0.1)
"""


def start(folder: Path, *does: str, more: tuple[object, ...] = ()) -> list[subprocess.Popen[str]]:
    """Three processes, by rank."""
    folder.mkdir()
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(folder), str(rank), what, *map(str, more)],
            env=environment() | {"LOCAL_RANK": "0"},  # each the first of a node
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, what in enumerate(does)
    ]


def launch(folder: Path, *does: str) -> list[tuple[int, str]]:
    """Exit code and stderr of three processes, by rank."""
    processes = start(folder, *does)
    said = [process.communicate(timeout=60)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 2])
@pytest.mark.parametrize("how", ["is killed", "forks"])
def test_a_killed_process_ends_the_others_which_name_it(tmp_path: Path, gone: int, how: str) -> None:
    """The end of a process that it forked before says nothing."""
    does = ["waits", "raises" if gone else "waits", "waits"]
    does[gone] = how
    ended = launch(tmp_path / "killed", *does)
    assert ended.pop(gone) == (-9, "")
    for code, said in ended:
        assert code == 1
        assert f"rank {gone} (on " in said
        assert ") was lost in step 7: its process " in said


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_others_in_time_and_they_name_it(tmp_path: Path, stopped: int) -> None:
    """The kernel goes on answering for it. Before the first step the others wait longer: they may compile."""
    does = ["waits"] * 3
    does[stopped] = "stops"
    late, early = start(tmp_path / "late", *does, more=(1, 7)), start(tmp_path / "early", *does, more=(1, 1))
    try:
        begun = time.monotonic()
        for rank, process in enumerate(late):
            if rank == stopped:
                continue
            said = process.communicate(timeout=30)[1]
            assert process.returncode == 1
            assert f"rank {stopped} (on " in said
            assert f") was lost in step 7: its process {late[stopped].pid} is stopped (by SIGSTOP" in said
        assert time.monotonic() - begun < 8
        assert [process.poll() for process in early] == [None] * 3
    finally:
        for process in (*late, *early):
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_the_last_words_of_a_process_that_fails_reach_the_others(tmp_path: Path, gone: int) -> None:
    does = ["waits"] * 3
    does[gone] = "fails"
    ended = launch(tmp_path / "failing", *does)
    assert ended.pop(gone) == (0, "")
    for code, said in ended:
        assert code == 4
        assert ") ended in step 7: OutOfMemoryError: 80 GB are\\x1b[31m not enough\nThis process cannot go on" in said


@pytest.mark.slow
def test_processes_that_have_done_what_they_should_end_nobody(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert launch(tmp_path / "ends", "ends", "raises", "ends")[::2] == [(0, ""), (0, "")]
    assert time.monotonic() - begun < 15


@pytest.mark.slow
def test_a_stranger_at_the_port_is_not_listened_to(tmp_path: Path) -> None:
    stranger = PROCESS.partition("rank, does")[0] + STRANGER
    folder = tmp_path / "folder"
    folder.mkdir()
    first = subprocess.Popen(
        [sys.executable, "-c", PROCESS.replace("time.sleep(0.1)\n", "", 1), str(folder), "0", "waits"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    done = subprocess.run([sys.executable, "-c", stranger, str(folder)], env=environment(), timeout=60, check=False)
    assert done.returncode == 0
    time.sleep(0.5)
    assert first.poll() is None, first.communicate()
    first.kill()
    assert first.communicate()[1] == ""
    assert json.loads((folder / "key").read_text())["token"]
