"""The benchmark against TRL gives both trainers the same work, and they compute the same gradient."""

from __future__ import annotations

import pytest

from tests.test_benchmarks import last_line


def test_a_step_beside_trls_has_equal_work_and_an_equal_gradient():
    pytest.importorskip("trl")
    size = ["--prompts=2", "--generations=4", "--mean-length=10", "--max-length=16", "--steps=1"]
    found = last_line("benchmarks.vs_trl", "--model=data/tiny_base", *size, "--rows", "same work")
    ours, theirs = found["same work"]["ours"], found["same work"]["trl"]
    for same in ("completion_tokens", "prompt_tokens", "longest", "groups_with_signal"):
        assert ours[same] == theirs[same], same
    assert found["gradient_difference"] < 1e-5
    assert found["samples_per_s_ratio"] == pytest.approx(ours["samples_per_s"] / theirs["samples_per_s"])
