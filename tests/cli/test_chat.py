"""``grpo chat``: the template of training, what is thinking, a model that writes what a terminal obeys, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.cli import chat
from grpo.cli.chat import DIM, RESET, Shown
from grpo.prompts.templates import PLAIN_TEMPLATES
from tests.cli.conftest import ROOT, run

RUN = """\
model: {name: data/tiny_base, dtype: float32}
data: {name: countdown, template: tinyzero}
rewards: [{path: missing.py:fn}]
rollout: {max_completion_length: 12}
training: {output_dir: run, num_threads: 1}
"""


@pytest.fixture
def a_run() -> Path:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(RUN)
    Path("run/final").symlink_to(ROOT / "data/tiny_base")
    return Path("run")


def shown(pieces: list[str], *, prefill: str = "", dims: bool = True) -> str:
    to = io.StringIO()
    show = Shown(to, dims=dims)
    show.begin(prefill)
    for piece in pieces:
        show.feed(piece)
    show.end()
    return to.getvalue().replace(DIM, "[").replace(RESET, "]")


@pytest.mark.parametrize(
    ("pieces", "prefill", "expected"),
    [
        (["a <think>b</think> c"], "", "a [<think>][b</think>] c\n"),
        (["a <th", "ink", ">b</", "think> c"], "", "a [<think>][b][</think>] c\n"),
        (["b</think> c"], "<think>", "[b</think>] c\n"),
        (["1 < 2 <thing>"], "", "1 < 2 <thing>\n"),
        (["never ends"], "<think>\n", "[never ends]\n"),
        (["b"], "<think>a</think>", "b\n"),
    ],
)
def test_thinking_is_dimmed_whatever_its_tags_are_cut_into(pieces: list[str], prefill: str, expected: str) -> None:
    text = shown(pieces, prefill=prefill)
    assert text.replace("][", "") == expected.replace("][", "")


def test_nothing_is_dimmed_where_there_is_no_terminal() -> None:
    assert shown(["<think>b</think> c"], dims=False) == "<think>b</think> c\n"


def test_what_a_terminal_obeys_is_shown_as_an_escape() -> None:
    assert shown(["\x1b]0;title\x07\r\x9b2J", "\u202e"], dims=False) == r"\x1b]0;title\x07\r\x9b2J\u202e" + "\n"
    assert "\x1b" not in "".join(chat.wrapped("a\x1b[2Jb" * 50, 20))


def test_two_answers_stand_side_by_side_with_their_thinking_dimmed() -> None:
    lines = ["final", *chat.wrapped("a b</think> c <think>d\ne</think>f", 16)]
    shown = chat.columns(lines, 20, thinking=True)
    assert [line.replace(DIM, "[").replace(RESET, "]") for line in shown] == [
        "final" + " " * 15,
        "[a b</think>] c " + " " * 6,
        "[<think>][d]" + " " * 12,
        "[e</think>]f" + " " * 10,
    ]
    assert {len(line.replace(DIM, "").replace(RESET, "")) for line in shown} == {20}


@pytest.mark.slow
def test_a_line_in_is_an_answer_out_and_another_model_answers_beside(a_run: Path) -> None:
    options = ["--temperature", "0", "--compare", "base", "--max-tokens", "6"]
    command = [sys.executable, "-m", "grpo", "chat", "run", *options, "--trust"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = "3 4 5 = 12\n\n  \n1 1 1 = 3\n"
    done = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    blocks = done.stdout.split("final:\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        final, base = block.split("base:\n")
        assert final == base, "the same model twice"
        assert final.strip()
    assert "\x1b" not in done.stdout


@pytest.mark.slow
def test_a_person_is_told_how_the_model_was_asked(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    assert chat.asked_in_training(tmp_path, "none") is None
    for template, (text, _) in PLAIN_TEMPLATES.items():
        row = {"prompt": text.format(question="6 3 9 = 27")}
        (tmp_path / "rollouts/eval_000000.jsonl").write_text(json.dumps({"step": 0, **row}) + "\n")
        assert chat.asked_in_training(tmp_path, template) == "6 3 9 = 27"
    assert chat.asked_in_training(tmp_path, "chat") is None


def test_a_model_to_compare_with_that_is_not_there_is_named_as_it_was_given(a_run: Path) -> None:
    result = run("chat", "run", "--compare", "./nosuch")
    assert result.exit_code == 2
    assert result.stderr.startswith("--compare ./nosuch: ")


@pytest.mark.slow  # imports torch in a process of its own
def test_ctrl_c_ends_in_one_line(a_run: Path) -> None:
    script = (
        "import os, signal, sys, grpo.cli.answer as a\n"
        "a.Answerer.answer = lambda self, q, s, show, begin: (show('half'), os.kill(os.getpid(), signal.SIGINT))[0]\n"
        "sys.argv = ['grpo', 'chat', 'run']\nfrom grpo.__main__ import main\nmain()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="q\n",
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "half\n", "stopped by Ctrl-C\n")


def test_a_folder_that_is_no_run_is_one_line() -> None:
    Path("run").mkdir()
    assert run("chat", "run").stderr == "run: is not a run folder (there is no recipe.yaml in it)\n"
    Path("run/recipe.yaml").write_text(RUN)
    assert run("chat", "run").stderr == "run: has no final model yet (there is no final in it)\n"


def test_rewards_of_a_strangers_run_are_not_in_the_way_but_its_models_code_is(
    a_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("grpo.cli.answer.Answerer", lambda *_, **__: said.append("loaded"), raising=False)
    assert run("chat", "run").exit_code == 0
    assert said == ["loaded"]
    Path("run/recipe.yaml").write_text(RUN.replace("name: data", "trust_remote_code: true, name: data"))
    result = run("chat", "run")
    assert result.exit_code == 2
    assert "trust_remote_code" in result.stderr
