"""Policies of several processes: how they start, and their checkpoints, which other numbers of processes read too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import ROOT, run_python
from tests.small_runs import lines, same_weights

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ended(root: Path) -> dict[str, list[int]]:
    """How the processes of each part of the script ended."""
    done = run_python(ROOT / "tests/processes/sharded_checkpoints.py", root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(done.stderr)  # pytest shows it with a failure
    return found


def test_every_part_ends_well_but_for_the_killed_one(ended: dict[str, list[int]]) -> None:
    """What each part checks is in the script."""
    assert {part for part, statuses in ended.items() if any(statuses)} == {"killed"}
    assert ended["killed"] == [1, -9]
    assert len(ended) == 29


def test_a_resumed_run_of_two_shards_is_the_whole_run_to_the_bit(ended: dict[str, list[int]], root: Path) -> None:
    assert lines(root / "stopped") == lines(root / "run")
    assert same_weights(root / "stopped", root / "run")
    shards = {path.name for path in (root / "run/checkpoints/step_000003/shards").iterdir()}
    assert shards == {".metadata", "__0_0.distcp", "__1_0.distcp"}
