"""Sampling through transformers' own caches: how many sequences share one, and caches that are not what they seem.

What models with recurrent layers sample is compared with what they compute in ``test_models.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.backends.base import Sampling
from grpo.backends.hf import own_cache
from grpo.backends.hf.backend import HFBackend
from grpo.errors import UserError
from tests.backends.hf.test_models import REQUESTS, policy_of


def test_a_cache_that_holds_no_sequence_is_refused(tiny_model: Path) -> None:
    backend = HFBackend(policy_of("LFM2", tiny_model), max_batch_size=8, kv_cache_gb=1e-6)
    backend.sync(backend.policy, 0)
    with pytest.raises(UserError, match=r"rollout.kv_cache_gb: 1e-06 GB do not hold one sequence of 20 tokens"):
        backend.generate(REQUESTS, Sampling(9), 0)


def test_a_batch_is_as_large_as_the_cache_allows(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("Qwen3.5", tiny_model)
    sizes: list[int] = []
    take = own_cache.Rows.take
    monkeypatch.setattr(own_cache.Rows, "take", lambda self, rows: (sizes.append(len(rows)), take(self, rows)))
    backend = HFBackend(policy, max_batch_size=64)
    backend.sync(policy, 0)
    state, token = backend.own_cache.state, backend.own_cache.token
    # In float32: one layer of keys and values, and two of states: four heads of 8 x 8, and 4 inputs of a convolution.
    assert token == 4 * 2 * 32
    assert state == 4 * 2 * (4 * 8 * 8 + 4 * (2 * 2 * 8 + 4 * 8))
    backend.cache_budget = 5.5 * (state + 20 * token)
    sizes.clear()
    backend.generate(REQUESTS, Sampling(9), 0)
    assert max(sizes) == 5


def test_a_model_that_decodes_otherwise_through_its_cache_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, take = policy_of("LFM2", tiny_model), own_cache.Rows.take
    monkeypatch.setattr(own_cache.Rows, "take", lambda self, rows: (take(self, rows), self.cache.layers[0].reset()))
    with pytest.raises(UserError, match=r"Lfm2ForCausalLM decodes to other logits through its cache"):
        HFBackend(policy, max_batch_size=8)
