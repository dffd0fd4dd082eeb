"""Rules of health in a real run of the tiny model: what is logged, what a stop leaves, and what a resumed run knows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from grpo.errors import RunError
from tests.small_runs import small_run

pytestmark = pytest.mark.slow
QUIET = {"cut_off": "off"}  # an untrained model fills its six tokens
SHORT: dict[str, Any] = {"evaluation": {"at_start": False}, "health": QUIET}


def healths(folder: Path) -> list[set[str]]:
    """By step, the rules that held after it."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name for name in row if name.startswith("health/")} for row in rows if "reward" in row]


def test_a_run_without_signal_says_so_and_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "grpo"):
        small_run(tiny_model, tmp_path / "run", monkeypatch, reward="always_one", **SHORT)
    assert healths(tmp_path / "run") == [set()] * 4 + [{"health/no_signal"}] * 2
    (said,) = [record.getMessage() for record in caplog.records if "no_signal" in record.getMessage()]
    assert said.startswith("step 5: health: no_signal: 100% of groups had no signal over 5 steps (mean reward 1.000)")
    assert (tmp_path / "run/final/model.safetensors").exists()


def test_a_run_with_signal_in_some_groups_is_left_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tiny_model, tmp_path / "run", monkeypatch, **SHORT)
    assert healths(tmp_path / "run") == [set()] * 6


def test_a_rule_that_stops_leaves_a_checkpoint_and_a_resumed_run_knows_its_past(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    stop = SHORT | {"reward": "always_one", "health": QUIET | {"no_signal": "stop"}}
    with pytest.raises(RunError, match=r"stopped by health\.no_signal: 100% of groups.*\(step 5\)"):
        small_run(tiny_model, folder, monkeypatch, steps=8, **stop)
    assert (folder / "checkpoints/step_000005").is_dir()
    assert not (folder / "final").exists()
    small_run(tiny_model, folder, monkeypatch, steps=8, resume=True, **stop | {"health": QUIET})
    assert healths(folder) == [set()] * 4 + [{"health/no_signal"}] * 4
