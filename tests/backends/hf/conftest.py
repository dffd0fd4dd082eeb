from __future__ import annotations

import pytest

from grpo.backends.hf import kv_cache, step_compiled


@pytest.fixture(params=[kv_cache.SHORT_PROMPT, 0], ids=["prompts copied", "prompts apart"])
def both_layouts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's two layouts. The tests' prompts are short; with a threshold of 0 none is."""
    monkeypatch.setattr(kv_cache, "SHORT_PROMPT", request.param)


@pytest.fixture(params=[True, False], ids=["compiled", "transformers"])
def both_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step as one compiled call, and through transformers as other models' are."""
    if not request.param:
        monkeypatch.setattr(step_compiled, "FAMILIES", frozenset())
