"""The workers of a run: they outlive who made them, and nobody's end leaves one behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from grpo.config import RewardConfig
from grpo.errors import RunError
from grpo.scoring.scorer import Scorer
from tests.launching import environment
from tests.scoring.helpers import MISBEHAVING, SHORT, alive, group, misbehaving, scorer, wait_until


def test_a_worker_killed_at_work_loses_nothing_that_can_be_scored_again(tmp_path):
    (tmp_path / "once.py").write_text(
        "import os, pathlib\n"
        "def once(completions, **kwargs):\n"
        f"    first = pathlib.Path({str(tmp_path / 'first')!r})\n"
        "    if not first.exists():\n"
        "        first.touch()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return [1.0] * len(completions)\n"
    )
    with scorer(RewardConfig(path=f"{tmp_path}/once.py:once"), max_failure_rate=0.0) as s:
        (first,) = s.worker_pids
        g = group("a", "b")
        s.score([g], step=1)
        assert g.rewards == [1.0, 1.0]
        assert s.worker_pids != [first]


def test_a_hang_is_killed_in_time_with_all_its_processes(tmp_path):
    (tmp_path / "spawns.py").write_text(
        "import subprocess, pathlib, time\n"
        "def spawns(completions, **kwargs):\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "    time.sleep(1000)\n"
    )
    with scorer(RewardConfig(path=f"{tmp_path}/spawns.py:spawns", timeout=SHORT), timeout=100) as s:
        started = time.monotonic()
        s.score([group("a")], step=1)
        assert time.monotonic() - started < 3
        child = int((tmp_path / "pid").read_text())
        assert wait_until(lambda: not alive(child))


LEAVES_PROCESSES = '''
import os, subprocess, sys, time
from pathlib import Path

FORKS = """
import os, sys, time
while True:
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")
    if os.fork():
        time.sleep(1000)
    time.sleep(0.02)
"""

def note(pid):
    with open(Path(__file__).with_name("pids"), "a") as file:
        file.write(f"{pid}\\n")

def leaves(completions, **kwargs):
    note(subprocess.Popen(["sleep", "1000"]).pid)
    note(subprocess.Popen(["sleep", "1000"], start_new_session=True, env={}, close_fds=True).pid)
    if os.fork() == 0:  # a daemon: its parent ends, nothing of this process is left in it
        os.setsid()
        if os.fork() == 0:
            note(os.getpid())
            os.execve("/bin/sleep", ["sleep", "1000"], {})
        os._exit(0)
    if completions == ["forks"]:
        subprocess.Popen([sys.executable, "-c", FORKS, str(Path(__file__).with_name("pids"))], start_new_session=True)
    while len(Path(__file__).with_name("pids").read_text().split()) < 3:
        time.sleep(0.01)
    note(0)
    if completions == ["dies"]:
        os.kill(os.getpid(), 11)
    if completions != ["done"]:
        time.sleep(1000)
    return [1.0]
'''


@pytest.mark.skipif(sys.platform != "linux", reason="subreapers")
@pytest.mark.parametrize("text", ["late", "forks", "dies", "done"])
def test_no_child_of_a_reward_outlives_its_worker(tmp_path, text):
    """Neither one in a session of its own, nor a daemon without a parent, nor one that goes on forking: when the worker
    is late, crashes, or is closed."""
    (tmp_path / "leaves.py").write_text(LEAVES_PROCESSES)
    with scorer(RewardConfig(path=f"{tmp_path}/leaves.py:leaves", timeout=1.0), timeout=100) as s:
        s.score([group(text)], step=1)
        pids = _noted(tmp_path)
        if text == "done":
            assert all(map(alive, pids)), "a function may keep what it has started, for the next call"
        pids = _noted(tmp_path)
    assert wait_until(lambda: not any(map(alive, _noted(tmp_path))))
    assert len(_noted(tmp_path)) == len(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="subreapers")
def test_no_child_of_a_reward_outlives_a_killed_trainer(tmp_path):
    (tmp_path / "leaves.py").write_text(LEAVES_PROCESSES)
    trainer = textwrap.dedent(
        f"""
        from grpo.config import RewardConfig, ScoringConfig
        from grpo.scoring.scorer import Scorer
        from grpo.types import Completion, Group, Prompt, Status
        scorer = Scorer([RewardConfig(path="{tmp_path}/leaves.py:leaves")], ScoringConfig(workers=1, timeout=60))
        scorer.start(step=1).add(Group(Prompt(0, "p", "p", []), [Completion([], [], Status.STOP, "late", [])]))
        input()
        """
    )
    with subprocess.Popen([sys.executable, "-c", trainer], stdin=subprocess.PIPE, env=environment()) as process:
        assert wait_until(lambda: (tmp_path / "pids").exists() and 0 in _noted(tmp_path, whole=True), 30)
        pids = _noted(tmp_path)
        assert all(map(alive, pids))
        process.kill()
        process.wait()
        assert wait_until(lambda: not any(map(alive, pids)))


def _noted(folder: Path, *, whole: bool = False) -> list[int]:
    return [pid for pid in map(int, (folder / "pids").read_text().split()) if pid or whole]


def test_closing_ends_workers_even_those_at_work():
    s = scorer(misbehaving("loops"), workers=2, timeout=60)
    pids = s.worker_pids
    assert len(set(pids)) == 2
    closer = threading.Timer(0.2, s.close)
    closer.start()
    started = time.monotonic()
    with pytest.raises(RunError, match="closed"):
        s.score([group("bad"), group("bad", id=1)], step=1)
    closer.join()
    s.close()
    assert time.monotonic() - started < 5
    assert not any(map(alive, pids))


def test_workers_outlive_the_thread_that_made_the_scorer():
    made: list[Scorer] = []
    thread = threading.Thread(target=lambda: made.append(scorer(misbehaving("pid"))))
    thread.start()
    thread.join()
    with made[0] as s:
        pids = s.worker_pids
        time.sleep(0.1)
        g = group("a")
        s.score([g], step=1)
        assert g.rewards == [float(pids[0])]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_no_worker_outlives_a_killed_trainer():
    """Neither an idle one, nor one that loops in Python, nor one that holds the interpreter in C."""
    trainer = textwrap.dedent(
        f"""
        from grpo.config import RewardConfig, ScoringConfig
        from grpo.scoring.scorer import Scorer
        from grpo.types import Completion, Group, Prompt, Status
        rewards = [RewardConfig(path=f"{MISBEHAVING}:{{name}}") for name in ("loops", "power_tower")]
        scorer = Scorer(rewards, ScoringConfig(workers=3, timeout=60))
        scorer.start(step=1).add(Group(Prompt(0, "p", "p", []), [Completion([], [], Status.STOP, "bad", [])]))
        print(*scorer.worker_pids, flush=True)
        input()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", trainer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
    )
    with process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        time.sleep(0.1)
        assert all(map(alive, pids))
        process.kill()
        process.wait()
        assert wait_until(lambda: not any(map(alive, pids)))
