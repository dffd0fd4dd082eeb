"""Rewards that bring their own workers (code, math): run from the trainer's threads, through the same scorer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from grpo.config import RewardConfig, ScoringConfig
from grpo.errors import UserError
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt, Status

TESTS = json.dumps({"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 3]})
PROGRAMS = {
    "right": "def f(x): return x + 1",
    "wrong": "def f(x): return x",
    "hangs": "def f(x):\n    while True: pass",
    "forks": "import os\nos.fork()",
    "crashes": "import ctypes\nctypes.string_at(0)",
}
REWARDS = {"right": 1.0, "wrong": 0.0, "hangs": 0.0, "forks": 0.0, "crashes": 0.0}
VERDICTS = {"correct": 1, "wrong": 1, "timeout": 1, "denied": 1, "no_result": 1}


def group(tests: str = TESTS, programs: dict[str, str] = PROGRAMS, **columns) -> Group:
    completions = [
        Completion([1], [0.0], Status.STOP, f"```python\n{program}\n```", []) for program in programs.values()
    ]
    return Group(Prompt(0, "write f", "write f", [1], columns={"tests": tests, **columns}), completions)


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    with Scorer([RewardConfig(name="code", args={"timeout": 0.5})], ScoringConfig(workers=2)) as scorer:
        yield scorer


def test_code_is_scored_beside_its_failures(scorer: Scorer) -> None:
    groups = [group(), group()]
    scorer.score(groups, step=0)
    for scored in groups:
        assert dict(zip(PROGRAMS, scored.rewards, strict=True)) == REWARDS
        assert scored.verdicts == {"code": VERDICTS}


def test_its_workers_are_the_trainers_children_and_are_replaced(scorer: Scorer) -> None:
    from rewards import code

    children = code._sandbox().pids
    assert len(children) == 2
    for pid in children:
        with open(f"/proc/{pid}/stat") as file:
            assert int(file.read().rpartition(")")[2].split()[1]) == os.getpid()
        os.kill(pid, signal.SIGKILL)
    scored = group(programs={"right": PROGRAMS["right"], "wrong": PROGRAMS["wrong"]})
    scorer.score([scored], step=0)
    assert scored.rewards == [1.0, 0.0]


def test_closing_ends_its_workers() -> None:
    from rewards import code

    with Scorer([RewardConfig(name="code")], ScoringConfig(workers=1)):
        pids = code._sandbox().pids
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_broken_tests_are_unscorable_and_counted(scorer: Scorer) -> None:
    broken, sound = group("{", {"right": PROGRAMS["right"]}), group(programs={"right": PROGRAMS["right"]})
    scorer.score([broken, sound], step=0)
    assert broken.rewards == [None]
    assert broken.verdicts == {"code": {"gold_unparseable": 1}}
    assert sound.rewards == [1.0]


def test_no_sandbox_is_the_users_to_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.sandbox.probe.LEVELS", ())
    with pytest.raises(UserError, match=r"rewards\[0\] \(rewards.code.code_reward\): no sandbox holds here"):
        Scorer([RewardConfig(name="code")], ScoringConfig())
    with Scorer([RewardConfig(name="code", args={"allow_unsafe": True})], ScoringConfig()) as unsafe:
        scored = group(programs={"right": PROGRAMS["right"]})
        unsafe.score([scored], step=0)
    assert scored.rewards == [1.0]
