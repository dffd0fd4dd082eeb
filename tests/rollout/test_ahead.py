"""Whole runs that sample ahead: within their bound, with all that chooses prompts, and exact on resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import lines, progress, same_weights, small_run

Run = Callable[..., list[tuple[int, list[int]]]]
AHEAD = {"backend": "vllm", "max_staleness": 2}
TRAINING = {"prompts_per_step": 4, "max_steps": 6, "num_threads": 1, "save_every": 2, "save_total_limit": 9}
ALL = {"dynamic_sampling": True, "curriculum": True, "replay_groups": 3, "max_resample": 2}


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda name, **keys: small_run(tiny_model, tmp_path / name, monkeypatch, **keys)


class Killed(Exception):
    """Ends a run as a kill does: nothing is saved."""


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [{}, {"dynamic_sampling": True}, ALL], ids=["plain", "dynamic", "all of it"])
def test_a_run_that_samples_ahead_keeps_its_bound_and_is_exact_on_resume(
    run: Run, tmp_path: Path, prompts: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"prompts": prompts, "rollout": AHEAD}
    whole = run("whole", training={"output_dir": str(tmp_path / "whole"), **TRAINING}, **settings)
    rows = lines(tmp_path / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    oldest = max(row["sampling/staleness/max"] for row in rows)
    assert 0 < oldest <= 2
    assert prompts or oldest == 2, "with a fixed number of prompts a step, the bound is used"
    for row in rows:
        assert row["sampling/staleness/mean"] <= row["sampling/staleness/max"] <= min(row["step"] - 1, 2)
        assert row.get("sampling/importance_sampling_ratio/mean", 1.0) > 0
        trained = [json.loads(x) for x in (tmp_path / f"whole/rollouts/step_{row['step']:06d}.jsonl").open()]
        versions = {v for x in trained for _, _, v in x["versions"]}
        if "replay_groups" not in prompts:
            assert row["step"] - 3 <= min(versions)
    drawn = sum(row.get("dynamic_sampling/groups_drawn", 4) for row in rows)
    assert sum(len(asked) for _, asked in whole) == drawn, "every prompt that was asked for was used"
    if not prompts.get("curriculum"):
        together = [row for _, asked in whole for row in asked]
        assert sorted(together[:24]) == list(range(24)), "an epoch has every row once"

    settings["training"] = {"output_dir": str(tmp_path / "cut"), **TRAINING}
    with pytest.raises(Killed):
        run("cut", fails_at=[version for version, _ in whole].index(3), failure=Killed, **settings)
    assert progress(tmp_path / "cut", 2)["rollout_ahead"]
    rest = run("cut", resume=True, **settings)
    assert rest == [call for call in whole if call[0] >= 2]
    assert lines(tmp_path / "cut") == rows
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    assert progress(tmp_path / "cut", 6)["rollout_ahead"] is None
