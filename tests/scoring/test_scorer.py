"""The reward functions of a recipe: finding and loading them, and what they see and say."""

from __future__ import annotations

import time

import pytest

from grpo.config import RewardConfig
from grpo.errors import UserError
from grpo.types import Status
from tests.scoring.helpers import group, misbehaving, scorer

LOAD_ERRORS = {
    "import_error.py:fn": (
        "import nothing_like_this\n",
        r"import_error.py:1: ModuleNotFoundError: .*nothing_like_this",
    ),
    "hungry.py:fn": ("x = 1\nn = 10**11\nb'x' * n\n", r"hungry.py:3: MemoryError.*scoring.memory_limit_gb"),
    "syntax.py:fn": ("x = 1\ndef fn(:\n", r"syntax.py:2: SyntaxError"),
    "quits.py:fn": ("import sys\n\nsys.exit('bye')\n", r"quits.py:3: SystemExit: bye"),
    "dies.py:fn": ("import os\nos._exit(3)\n", r"exited with status 3"),
    "other.py:fn": ("def reward(completions, **kwargs): ...\n", r"other.py has no 'fn' \(it has: reward\)"),
    "value.py:fn": ("fn = 3\n", r"'fn' in .*value.py is no function but 3"),
    "missing.py:fn": (None, r"there is no file .*missing.py"),
    "no_name.py:1fn": ("", r"rewards\[0\].path: expected file.py:name or package.module:name, got"),
}


@pytest.mark.parametrize("path", LOAD_ERRORS)
def test_a_function_that_cannot_be_loaded(tmp_path, path):
    text, said = LOAD_ERRORS[path]
    if text is not None:
        (tmp_path / path.partition(":")[0]).write_text(text)
    with pytest.raises(UserError, match=said):
        scorer(RewardConfig(path=f"{tmp_path}/{path}"))


def test_all_functions_that_cannot_be_loaded_are_named_at_once(tmp_path):
    (tmp_path / "a.py").write_text("1/0\n")
    with pytest.raises(
        UserError, match=r"rewards\[0\].*a.py:1: ZeroDivisionError(.|\n)*rewards\[2\] \(no_such_pkg:fn\)"
    ):
        scorer(
            RewardConfig(path=f"{tmp_path}/a.py:fn"), RewardConfig(name="format"), RewardConfig(path="no_such_pkg:fn")
        )


def test_an_unknown_builtin_lists_those_there_are():
    with pytest.raises(UserError, match=r"no built-in reward 'countdwon' \(there are: .*countdown.*format"):
        scorer(RewardConfig(name="countdwon"))


def test_arguments_are_checked():
    with pytest.raises(UserError, match=r"args: it takes no scale \(it takes: nums, target\)"):
        scorer(RewardConfig(name="countdown", args={"scale": 2}))
    with pytest.raises(UserError, match=r"args\.status is a name the trainer passes itself"):
        scorer(misbehaving("length", args={"status": 2}))


def test_what_a_function_sees_and_says():
    with scorer(misbehaving("sees", args={"bonus": 0.5}), max_steps=100) as s:
        g = group("a", "bb", columns={"nums": [1, 2]}, prefill="<think>")
        g.completions[1].status = Status.LENGTH
        s.score([g], step=7)
    assert g.rewards == [0.5, 0.5]
    assert g.extra_columns == {"seen": ["p|a|[1]|stop|<think>|[]", "p|bb|[2]|length|<think>|[1, 2]"]}
    assert {name.split("/logged/")[1]: values for name, values in g.extra_metrics.items()} == {"step_seen": [107.0]}
    assert g.verdicts == {"sees": {"fine": 2}}
    assert g.prompt.columns == {"nums": [1, 2]}


def test_chat_prompts_and_completions_are_messages(tmp_path):
    (tmp_path / "chat.py").write_text(
        "def chat(prompts, completions, **kwargs):\n"
        "    assert [p[0]['content'] for p in prompts] == ['hi', 'hi']\n"
        "    assert completions == [[{'role': 'assistant', 'content': c}] for c in 'xy']\n"
        "    return [1, 2]\n"
    )
    with scorer(RewardConfig(path=f"{tmp_path}/chat.py:chat"), RewardConfig(name="format")) as s:
        g = group("x", "y", prompt=[{"role": "user", "content": "hi"}])
        s.score([g], step=1)
    assert g.rewards_by_function == {"chat": [1.0, 2.0], "format": [0.0, 0.0]}


def test_512_countdown_completions_take_well_under_a_second():
    groups = [
        group(*["<think>so</think><answer>3*8 = 24</answer>"] * 16, id=i, columns={"nums": [3, 8], "target": 24})
        for i in range(32)
    ]
    with scorer(RewardConfig(name="countdown"), workers=2, timeout=10) as s:
        s.score(groups[:2], step=0)
        seconds = []
        for step in range(3):
            started = time.monotonic()
            s.score(groups, step)
            seconds.append(time.monotonic() - started)
    assert all(g.rewards == [1.0] * 16 for g in groups)
    assert min(seconds) < 0.5  # 0.03 s on an idle machine
