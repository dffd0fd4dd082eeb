"""Episodes on the page and in the terminal: a conversation, calls folded, and nothing of theirs is run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from grpo.report.conversation import in_a_line, notes_of, said
from grpo.report.curves import curves_svg
from grpo.report.page import page
from grpo.report.watch import picture
from grpo.run.fields import TRAINING, texts
from grpo.run.read import headline, read_run
from tests.report.made_runs import HOSTILE, Page, eval_row, make_run, turns_of, write_jsonl

ROW = eval_row(3, 1, 1.0, 40)
EPISODE = ROW | {"turns": turns_of(ROW), "status": "turns"}


def test_each_turn_stands_apart_and_calls_are_folded() -> None:
    read = Page(f"<main>{said(EPISODE)}</main>")
    assert read.count("turn") == 3  # of the environment's two, the results stand with the calls
    assert read.count("said") == 1
    assert [tag for tag, _ in read.tags].count("details") == 2
    assert not any("open" in attributes for tag, attributes in read.tags if tag == "details")
    heads = read.all("summary")
    assert heads[0].startswith('calculator(expression="<script>alert')
    assert "…) → 3.14159" in heads[0]
    assert heads[0].endswith("…")
    assert heads[1].endswith("failed: malformed")
    assert read.all("note") == ["turn 1 · 12 tokens · reward 0.1", "turn 2 · 5 tokens · cut off · advantage -0.50"]
    assert "<script>" not in said(EPISODE)


def test_what_the_model_has_read_in_part_is_said() -> None:
    turns = [{"role": "environment", "text": "a long story", "tokens": 9, "cut": True}]
    assert Page(f"<main>{said(ROW | {'turns': turns})}</main>").all("note") == ["the model read 9 tokens of it"]


def test_a_completion_without_turns_is_its_text() -> None:
    assert said(ROW | {"completion": "x < y"}) == "<pre>x &lt; y</pre>"
    assert notes_of(ROW) == []


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        (EPISODE, ["2 turns", "2 calls, 1 failed", "out of turns"]),
        ({"turns": [{"role": "assistant"}], "status": "environment"}, ["1 turn", "ended by the environment"]),
        ({"turns": [], "status": "error", "failure": "timeout"}, ["0 turns", "failed: timeout"]),
    ],
)  # fmt: skip
def test_what_is_said_beside_it(row: dict, notes: list[str]) -> None:
    assert notes_of(row) == notes


def test_a_line_has_both_sides() -> None:
    calls = [{"name": "add", "result": "3", "error": ""}, {"result": "no JSON", "error": "malformed"}]
    turns = [
        {"role": "environment", "text": "begin"},
        {"role": "assistant", "text": "add", "calls": calls},
        {"role": "environment", "text": ""},
        {"role": "assistant", "text": "it is 3"},
    ]
    assert in_a_line(turns) == "[begin] add [3] [!no JSON] it is 3"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "tools", steps=20, every=10, tasks=12, episodes=True)
    write_jsonl(folder / "rollouts/step_000020.jsonl", [EPISODE | {"prompt_id": i, "sample": i} for i in range(3)])
    return folder


def test_the_page_has_curves_of_turns_and_the_same_prompts_episodes_before_and_after(run: Path) -> None:
    record = read_run(run)
    text = page(record, headline(record), curves_svg(record))
    read = Page(text)
    captions = read.all("b") + read.all("figcaption")
    for title in ("Turns", "Tool calls", "How episodes ended"):
        assert any(title in caption for caption in captions), title
    assert read.count("turns") == 2 * read.count("cells")  # at the first and at the last evaluation
    assert "4.0 → 2." in text
    assert "2 turns · 2 calls, 1 failed" in text
    assert HOSTILE not in text


def test_the_terminal_shows_turns_and_calls(run: Path) -> None:
    shown = str(picture(read_run(run), Console(width=100, file=io.StringIO())))
    assert "turns 2." in shown
    assert "calls of tools 0.9" in shown
    assert "2 turns  2 calls, 1 failed  out of turns" in shown
    metrics = {"reward": 0.5, "completions/mean_turns": 2.25, "tools/call_frequency": 0.5}
    assert texts(TRAINING, metrics) == ["reward 0.500", "turns 2.2", "calls 0.5"]
