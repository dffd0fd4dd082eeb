"""Ctrl-C at a real terminal: once the step is finished and saved, twice the run ends now with what can be saved."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launching import environment, run_python
from tests.resuming import command, lines, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SHORT = ("training.max_steps=12", "training.save_every=0")
CTRL_C = b"\x03"


class Terminal:
    """A process whose standard streams are a terminal that controls it: a key reaches its whole foreground group."""

    def __init__(self, arguments: list[str]):
        self.end, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKES_THE_TERMINAL, *arguments],
            env=environment(), stdin=child, stdout=child, stderr=child, start_new_session=True,
        )  # fmt: skip
        os.close(child)
        os.set_blocking(self.end, False)
        self.said = ""

    def press(self, key: bytes) -> None:
        os.write(self.end, key)

    def read(self) -> str:
        try:
            while chunk := os.read(self.end, 1 << 16):
                self.said += chunk.decode(errors="replace")
        except OSError:  # nothing there now, or the other end is closed
            pass
        return self.said

    def wait_until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not what():
            self.read()
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def ended(self) -> int:
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()  # or it would wait for a reader
            time.sleep(0.01)
        self.read()
        os.close(self.end)
        return self.process.wait(timeout=1)


TAKES_THE_TERMINAL = """
import fcntl, runpy, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_python(*command(tiny_model, folder, *SHORT))
    assert done.returncode == 0, done.stderr
    return folder


def steps(folder: Path) -> int:
    return max((row["step"] for row in lines(folder)), default=0) if (folder / "metrics.jsonl").exists() else 0


def test_once_the_step_is_finished_and_saved_and_resume_goes_on_to_the_same_bits(
    undisturbed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    terminal = Terminal(command(tiny_model, folder, *SHORT))
    terminal.wait_until(lambda: steps(folder) >= 2)
    terminal.press(CTRL_C)
    assert terminal.ended() == 130, terminal.said
    said = " ".join(terminal.said.split())
    assert said.count("Ctrl-C: this step is finished and saved, then the run ends; press it again to end now") == 1
    assert f"stopped by Ctrl-C: saved {folder}/checkpoints/step_" in said.replace("\n", "")
    assert "Traceback" not in said
    assert 2 <= steps(folder) < 12
    assert (folder / f"checkpoints/step_{steps(folder):06d}").is_dir()
    done = run_python(*command(tiny_model, folder, *SHORT, "--resume"))
    assert done.returncode == 0, done.stderr
    assert lines(folder) == lines(undisturbed)
    assert weights(folder) == weights(undisturbed)


def test_twice_within_a_rollout_it_ends_now_with_the_last_step_saved(tiny_model: Path, tmp_path: Path) -> None:
    """A reward function that takes ten seconds from the third step on: the step is not waited for."""
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "def slow(completions, trainer_state, **_):\n"
        "    time.sleep(9 if trainer_state.global_step >= 2 else 0)\n"
        "    return [float(len(c) % 8 == 0) for c in completions]\n"
    )
    folder, reward = tmp_path / "run", f"rewards=[{{path: {tmp_path}/slow.py:slow, timeout: 60}}]"
    terminal = Terminal(command(tiny_model, folder, *SHORT, reward))
    terminal.wait_until(lambda: steps(folder) == 2)
    time.sleep(1)
    begun = time.monotonic()
    terminal.press(CTRL_C)
    terminal.wait_until(lambda: "press it again" in terminal.said)
    assert terminal.process.poll() is None
    terminal.press(CTRL_C)
    assert terminal.ended() == 130, terminal.said
    assert time.monotonic() - begun < 7, "it has not waited for the step"
    assert "step_000002; start again with --resume" in " ".join(terminal.said.split())
    assert "Traceback" not in terminal.said
    assert (folder / "checkpoints/step_000002").is_dir()
    fast = reward.replace("slow, timeout: 60", "slow, timeout: 60, args: {}")
    (tmp_path / "slow.py").write_text((tmp_path / "slow.py").read_text().replace("time.sleep(9", "time.sleep(0"))
    done = run_python(*command(tiny_model, folder, *SHORT, fast, "--resume", "--allow-changed-inputs"))
    assert done.returncode == 0, done.stderr
    assert steps(folder) == 12


def test_before_the_first_step_once_is_enough(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    terminal = Terminal(command(tiny_model, folder, *SHORT))
    terminal.wait_until((folder / "environment.json").exists)
    terminal.press(CTRL_C)
    assert terminal.ended() == 130, terminal.said
    assert "Traceback" not in terminal.said
    assert not (folder / "checkpoints").exists()


def test_a_signal_of_somebody_s_own_is_heard_as_ctrl_c_is(tiny_model: Path, tmp_path: Path) -> None:
    """Without a terminal, as ``docker stop --signal=INT`` sends it."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *command(tiny_model, folder, *SHORT)],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while steps(folder) < 1 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "saved" in said.splitlines()[-1]
