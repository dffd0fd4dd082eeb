"""``examples/minimal_grpo.py`` learns."""

from __future__ import annotations

import pytest

from tests.test_minimal_grpo import minimal


def test_it_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """Six of its twenty steps. Seeds 0 to 7 gained 0.26 to 0.31, in 30 s each. With nothing learned the
    difference of two evaluations of 644 tasks has a standard deviation of 0.02."""
    before, after = minimal.train(seed=0, steps=6)
    assert after - before > 0.15
    printed = capsys.readouterr().out
    assert f"after: {after:.3f} of 644 held-out tasks solved, {before:.3f} before" in printed
