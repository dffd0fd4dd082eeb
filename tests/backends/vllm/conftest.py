"""Backends that generate with fake engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.backends.vllm import keeper as keeper_module
from grpo.backends.vllm import trust
from grpo.backends.vllm.backend import VLLMBackend
from grpo.model.policy import Policy
from tests.conftest import make_policy, make_recipe
from tests.fake_vllm_engine import FakeEngine


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    return make_policy(tiny_model)


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[FakeEngine]:
    made = FakeEngine(tiny_model)
    yield made
    made.gate.set()
    made.close()


@pytest.fixture
def connect(
    tiny_model: Path, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., VLLMBackend]]:
    """Backends that generate with fake engines."""
    monkeypatch.setattr(keeper_module, "SECONDS_BETWEEN_TRIES", 0.02)
    monkeypatch.setattr(trust, "PROBES", 2)
    monkeypatch.setattr(trust, "PROBE_TOKENS", 8)
    made = []

    def connect(
        *engines: FakeEngine,
        seconds: float = 5.0,
        policy: Policy = policy,
        lora: dict[str, Any] | None = None,
        **rollout: Any,
    ) -> VLLMBackend:
        rollout = {
            "backend": "vllm",
            "vllm_mode": "server",
            "vllm_server_base_url": [engine.url for engine in engines],
            "vllm_server_timeout": seconds,
            "vllm_sync_timeout": 5.0,
            "vllm_sync_dir": str(tmp_path),
            "max_completion_length": 12,
        } | rollout
        model = {"lora": lora} if lora else {}
        recipe = make_recipe(tiny_model, model=model, rollout=rollout, data={"max_prompt_length": 64})
        made.append(VLLMBackend(policy, recipe))
        return made[-1]

    yield connect
    for backend in made:
        backend.close()
