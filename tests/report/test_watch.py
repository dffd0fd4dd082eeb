"""A run in a terminal: nothing wider than it, nothing that steers it, and an end."""

from __future__ import annotations

import fcntl
import io
import json
import re
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from grpo.errors import UserError
from grpo.report import watch as watching
from grpo.report.braille import nice, plot
from grpo.report.watch import picture, watch
from grpo.run.read import read_run
from tests.report.made_runs import HOSTILE, make_run, write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("watched") / "run", steps=40, every=20, tasks=4)
    rows = [{"step": 40, "prompt_id": i, "completion": HOSTILE + "x" * 5000, "reward": i / 2} for i in range(3)]
    write_jsonl(folder / "rollouts/step_000040.jsonl", rows)
    return folder


def shown(folder: Path, width: int, encoding: str = "utf-8", *, terminal: bool = False, once: bool = True) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    watch(folder, once=once, console=Console(file=file, width=width, height=50, force_terminal=terminal))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_curves_and_newest_completions_fit_into_the_terminal(run, width):
    lines = shown(run, width).splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert lines[0].startswith("demo: step 40/40" if "demo" in lines[0] else "run: step 40/40")
    assert all(title in text for title in ("held-out accuracy 0.449", "reward", "length", "entropy"))
    assert re.search("[\u2801-\u28ff]{3}", text)
    assert "#2  reward 1" in text
    assert "#0  reward 0" in text


def test_a_rule_that_holds_is_told_whole(tmp_path):
    make_run(tmp_path / "run", steps=20, every=10, tasks=2, collapsed=True)
    text = shown(tmp_path / "run", 50)
    said = " ".join(text.split())
    assert "health: no_signal: 100% of groups had no signal over 5 steps (mean reward" in said
    assert max(map(len, text.splitlines())) <= 50


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 40), (120, 30), (40, 30)])
def test_a_low_terminal_gets_what_matters_in_its_lines(run, width, height):
    console = Console(width=width, height=height, file=io.StringIO())
    lines = picture(read_run(run), console, height).plain.split("\n")
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert all(any(title in line for line in lines) for title in ("held-out accuracy", "reward", "length", "entropy"))
    if width >= 72:
        assert all(any(line.startswith(f"#{i}  reward") for line in lines) for i in range(3))


def test_no_completion_steers_the_terminal(run):
    text = shown(run, 80)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "\\x1b" in text


def test_a_terminal_without_unicode_gets_stars(run):
    text = shown(run, 80, "ascii")
    assert "***" in text


def test_it_ends_when_the_run_ends(run, monkeypatch):
    monkeypatch.setattr(watching, "SECONDS", 0.02)
    (run / ".lock").write_text("")
    with (run / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said: list[str] = []
        looking = threading.Thread(target=lambda: said.append(shown(run, 80, terminal=True, once=False)))
        looking.start()
        time.sleep(0.3)
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"step": 41, "reward": 0.5}) + "\n")
        time.sleep(0.3)
        assert looking.is_alive()
    looking.join(10)
    assert not looking.is_alive()
    assert "step 41/40" in said[0]
    assert said[0].rstrip().endswith("has ended")


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        shown(tmp_path / "none", 80)
    with pytest.raises(UserError, match="not a run folder"):
        shown(tmp_path, 80, terminal=True, once=False)


def test_a_curve_reaches_from_0_to_the_top():
    assert plot([0, 1, 2], [0, 0.5, 1], 3, 3, right=2, top=1.0, ascii_only=True) == ["  *", " * ", "*  "]
    (low, high) = (plot([0, 10], [y, y], 4, 2, right=10, top=1.0) for y in (0.0, 1.0))
    assert low == ["    ", "\u28c0" * 4]
    assert high == ["\u2809" * 4, "    "]
    assert [nice(top) for top in (0, 0.13, 0.9, 1.0, 2.2, 46, 101)] == [1.0, 0.2, 1.0, 1.0, 2.5, 50, 200]
