"""A run that goes back to its best model and is cut off on the way: by Ctrl-C twice, and by an engine that is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.errors import BackendFailed, Preempted, RunError
from tests.run.test_rollback import run_until, same, weights
from tests.small_runs import lines

pytestmark = pytest.mark.slow


def test_it_is_the_undisturbed_run_to_the_bit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_until(RunError, tiny_model, whole, monkeypatch)
    calls = [  # of each start, after which it is cut off: in the evaluation after step 4, in step 7, in the one after 8
        (5, KeyboardInterrupt, Preempted),
        (3, KeyboardInterrupt, Preempted),
        (2, BackendFailed, BackendFailed),
    ]
    for place, (at, failure, ending) in enumerate(calls):
        run_until(ending, tiny_model, cut, monkeypatch, fails_at=at, failure=failure, resume=place > 0)
    run_until(RunError, tiny_model, cut, monkeypatch, resume=True)
    assert lines(cut) == lines(whole)
    assert same(weights(cut, "step_000010"), weights(whole, "step_000010"))
