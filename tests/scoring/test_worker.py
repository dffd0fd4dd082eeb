"""The process in which reward functions run: what is in it, what functions may do there, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.config import RewardConfig, ScoringConfig
from grpo.scoring.functions import tell_left_out
from grpo.scoring.scorer import Scorer
from tests.scoring.helpers import group, misbehaving, scorer

ROOT = str(Path(__file__).parents[2])


def test_workers_import_neither_torch_nor_the_schema():
    with scorer(misbehaving("torch_here"), RewardConfig(name="countdown")) as s:
        g = group("a", columns={"nums": [1], "target": 1})
        s.score([g], step=1)
    assert g.rewards_by_function["torch_here"] == [0.0]


def test_what_a_worker_imports_is_the_standard_library_and_ours():
    program = (
        "import sys; before = set(sys.modules); import grpo.scoring.worker\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert set(said.stdout.split()) <= {"grpo", "rewards", "__mp_main__"}  # multiprocessing names __main__ so


@pytest.mark.parametrize("function", ["prints", "closes_stdout", "changes_the_path"])
def test_what_else_a_function_does_is_its_own_affair(function):
    with scorer(misbehaving(function)) as s:
        (pid,) = s.worker_pids
        groups = [group("a", "bb", id=i) for i in range(3)]
        s.score(groups, step=1)
        assert [g.rewards for g in groups] == [[1.0, 2.0]] * 3
        assert s.worker_pids == [pid]


def test_a_child_that_comes_back_from_a_function_does_not_answer():
    """The trainer would take its late answer for that of a later call."""
    with scorer(misbehaving("forks")) as s:
        (pid,) = s.worker_pids
        first, second = group("a"), group("bbb")
        s.score([first], step=1)
        with scorer(misbehaving("awaits")) as other:  # 0.3 s, in which the child comes back
            other.score([group("a")], step=1)
        s.score([second], step=2)
        assert (first.rewards, second.rewards) == ([1.0], [3.0])
        assert s.worker_pids == [pid]  # nothing had come that was not asked for


def test_a_module_on_the_path_and_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "judge.py").write_text(
        "from my_pkg.help import one\ndef fn(completions, **kw): return one(completions)"
    )
    (tmp_path / "my_pkg" / "help.py").write_text("def one(cs): return [1] * len(cs)")
    (tmp_path / "rewards").mkdir()  # a folder of the user's that must not shadow ours
    (tmp_path / "rewards" / "__init__.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    with scorer(RewardConfig(path="my_pkg.judge:fn"), RewardConfig(name="format")) as s:
        g = group("a")
        s.score([g], step=1)
    assert g.rewards_by_function == {"fn": [1.0], "format": [0.0]}


def test_a_worker_whose_trainer_died_before_it_could_ask_ends_at_once():
    boot = "from grpo.scoring.worker import serve; serve(0, 1, 999999999)"  # the parent it expects is not its own
    ended = subprocess.run(
        [sys.executable, "-c", boot], env={**os.environ, "PYTHONPATH": ROOT}, stdin=subprocess.DEVNULL, timeout=10
    )
    assert ended.returncode == 1


def test_ctrl_c_and_sigterm_are_the_trainers():
    with scorer(misbehaving("pid")) as s:
        (pid,) = s.worker_pids
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        g = group("a")
        s.score([g], step=1)
        assert g.rewards == [float(pid)]


@pytest.mark.parametrize(("named", "rewards"), [([], [0.0, 0.0]), (["JUDGE_API_KEY"], [1.0, 0.0])])
def test_a_function_does_not_get_secrets_unless_they_are_named(tmp_path, monkeypatch, named, rewards, caplog):
    caplog.set_level("INFO", logger="grpo")
    monkeypatch.setenv("JUDGE_API_KEY", "1")
    monkeypatch.setenv("HF_TOKEN", "1")
    (tmp_path / "asks.py").write_text(
        "import os\n"
        "def asks(completions, **kwargs):\n"
        "    return [float(os.environ.get(name, 0)) for name in completions]\n"
    )
    scoring, rewards_of = ScoringConfig(workers=1, environment=named), [RewardConfig(path=f"{tmp_path}/asks.py:asks")]
    tell_left_out(rewards_of, scoring.environment)
    with Scorer(rewards_of, scoring) as s:
        g = group("JUDGE_API_KEY", "HF_TOKEN")
        s.score([g], step=1)
    assert g.rewards == rewards
    assert "HF_TOKEN" in caplog.text
    assert ("JUDGE_API_KEY" in caplog.text) == (not named)
