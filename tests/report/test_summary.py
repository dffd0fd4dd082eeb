"""The line with which a demo ends, and the file beside it."""

from __future__ import annotations

import json
import sys

import pytest

from grpo.errors import UserError
from grpo.report.summary import main, write_summary


def run_folder(tmp_path, *lines):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluation(step, accuracy, length):
    return {"step": step, "eval/accuracy": accuracy, "eval/completions/mean_length": length}


def test_first_and_last_evaluation(tmp_path):
    folder = run_folder(
        tmp_path,
        evaluation(0, 0.16, 46.0),
        {"step": 1, "reward": 0.2, "step_time": 4.0},
        evaluation(1, 0.9, 900.0),
        {"step": 2, "reward": 0.3, "step_time": 3.6},
        evaluation(2, 0.4784, 98.96),
    )
    line = write_summary(folder)
    assert line == "demo: held-out accuracy 0.160 -> 0.478, mean completion length 46.0 -> 99.0 tokens, 8 s"
    assert json.loads((folder / "summary.json").read_text()) == {
        "accuracy_before": 0.16,
        "accuracy_after": 0.4784,
        "length_before": 46.0,
        "length_after": 98.96,
        "seconds": 7.6,
    }


@pytest.mark.parametrize("lines", [[evaluation(0, 0.1, 40.0)], [{"step": 1, "reward": 0.2, "step_time": 4.0}]])
def test_a_run_without_a_second_evaluation_has_no_summary(tmp_path, lines):
    folder = run_folder(tmp_path, *lines)
    with pytest.raises(UserError, match="not evaluated before and after"):
        write_summary(folder)
    assert not (folder / "summary.json").exists()


def test_the_name_of_a_folder_cannot_steer_the_terminal(tmp_path, monkeypatch, capsys):
    folder = run_folder(tmp_path, evaluation(0, 0.1, 9.0), {"step": 1, "step_time": 1.0}, evaluation(1, 0.2, 9.0))
    steers = folder.rename(tmp_path / "a\x1b[31m\u202eb")
    monkeypatch.setattr(sys, "argv", ["summary", str(steers)])
    main()
    assert capsys.readouterr().out.startswith("a\\x1b[31m\\u202eb: held-out accuracy 0.100 -> 0.200")
    monkeypatch.setattr(sys, "argv", ["summary", str(steers / "none")])
    with pytest.raises(SystemExit):
        main()
    assert "\x1b" not in capsys.readouterr().err
