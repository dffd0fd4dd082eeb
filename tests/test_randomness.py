"""Draws are functions of their keys, and look random."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from grpo.randomness import Stream, key, permutation, uniforms


def test_a_draw_depends_on_its_key_and_position_alone() -> None:
    keys = [key(0, "rollout", 3, prompt, g) for prompt in range(5) for g in range(4)]
    together = uniforms(keys, np.arange(100))
    np.testing.assert_array_equal(uniforms([keys[7]], np.arange(100))[0], together[7])
    np.testing.assert_array_equal(uniforms(keys, np.arange(40, 60)), together[:, 40:60])


def test_another_process_draws_the_same() -> None:
    """Python's own hash of a string differs from process to process; ours must not."""
    code = "from grpo.randomness import key; print(key(1, 'rollout', 2, 3, 4))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == key(1, "rollout", 2, 3, 4)


def test_uniforms_are_uniform_and_independent() -> None:
    draws = uniforms([key(0, "rollout", 0, p, g) for p in range(64) for g in range(16)], np.arange(128))
    assert draws.min() >= 0
    assert draws.max() < 1
    n = draws.size
    counts, _ = np.histogram(draws, bins=64, range=(0, 1))
    chi2 = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert chi2 < 63 + 5 * np.sqrt(2 * 63)  # 5 standard deviations
    for a, b in ((draws[:, :-1], draws[:, 1:]), (draws[:-1], draws[1:])):  # neighbours in position, in sample
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(n)


def test_keys_differ_where_any_part_differs() -> None:
    keys = {key(s, t, n, p, g) for s in (0, 1) for t in Stream for n in range(4) for p in range(20) for g in range(8)}
    assert len(keys) == 2 * len(Stream) * 4 * 20 * 8
    assert key(0, 11) != key(0, 1, 1) != key(1, 1)


def test_a_permutation_is_one_and_differs_by_epoch() -> None:
    first, second = (permutation(0, Stream.DATA_ORDER, epoch, 100) for epoch in (0, 1))
    assert sorted(first) == list(range(100))
    assert (first != second).any()
