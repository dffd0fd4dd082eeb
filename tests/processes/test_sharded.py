"""Policies of several processes: how they start, and their checkpoints, which other numbers of processes read too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import how_parts_ended
from tests.small_runs import lines, same_weights

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ended(root: Path) -> dict[str, list[int]]:
    """How the processes of each part of the script ended."""
    found, said = how_parts_ended("sharded_checkpoints.py", root)
    (root / "said.txt").write_text(said)
    return found


def test_every_part_ends_well_but_for_the_killed_one(ended: dict[str, list[int]]) -> None:
    """What each part checks is in the script."""
    assert {part for part, statuses in ended.items() if any(statuses)} == {"killed", "asked to stop at the start"}
    assert ended["killed"] == [1, -9]
    assert len(ended) == 46


def test_a_process_that_is_asked_to_stop_while_the_run_starts_ends_all_as_preempted(
    ended: dict[str, list[int]], root: Path
) -> None:
    assert ended["asked to stop at the start"] == [143, 143]
    assert not (root / "asked/checkpoints").exists()
    assert "asked to stop before the first step: there is nothing new to save" in (root / "said.txt").read_text()


def test_a_resumed_run_of_two_shards_is_the_whole_run_to_the_bit(ended: dict[str, list[int]], root: Path) -> None:
    assert lines(root / "stopped") == lines(root / "run")
    assert same_weights(root / "stopped", root / "run")
    shards = {path.name for path in (root / "run/checkpoints/step_000003/shards").iterdir()}
    assert shards == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_processes_go_back_to_the_best_model_together_and_a_resumed_run_has_gone_back(
    ended: dict[str, list[int]], root: Path
) -> None:
    at_its_end = [row for row in lines(root / "back, stopped") if row["step"] == 6 and "eval/accuracy" in row]
    assert len(at_its_end) == 1  # it was to have six steps, and a run evaluates its last model
    assert [row for row in lines(root / "back, stopped") if row not in at_its_end] == lines(root / "back")
    assert same_weights(root / "back, stopped", root / "back")
    for name in ("back", "back as replicas"):
        assert [row["step"] for row in lines(root / name) if row.get("rollback/to_step") == 0] == [5]
        # Before that, Adam turns a first gradient that is rounding alone (no signal, no KL yet) into whole steps.
        for one, other in zip(since_it_went_back(root / "back alone"), since_it_went_back(root / name), strict=True):
            assert one == pytest.approx(other, rel=2e-3, abs=1e-5)


def since_it_went_back(run: Path) -> list[dict[str, Any]]:
    rows = lines(run)
    return rows[next(i for i, row in enumerate(rows) if "rollback/to_step" in row) :]


@pytest.mark.parametrize(("name", "processes"), [("one goes on", 1), ("replicas", 2), ("four", 4)])
def test_the_command_goes_on_with_another_number_of_processes_to_rounding_and_says_so(
    ended: dict[str, list[int]], root: Path, name: str, processes: int
) -> None:
    for one, other in zip(lines(root / "run"), lines(root / name), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5)
    whole, gone_on = (load_file(root / run / "final/model.safetensors") for run in ("run", name))
    for key, tensor in whole.items():
        torch.testing.assert_close(gone_on[key], tensor, atol=2e-4, rtol=1e-3)
    said = [line for line in (root / "said.txt").read_text().splitlines() if f"world_size: 2 -> {processes}" in line]
    assert len(said) == (processes != 2)
    assert all("not equal to the bit" in line for line in said)
