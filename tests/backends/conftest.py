from __future__ import annotations

import pytest

from grpo.backends import kv_cache


@pytest.fixture(params=[kv_cache.SHORT_PROMPT, 0], ids=["rows begin with their prompts", "prompts apart"])
def both_layouts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's two layouts: the tests' prompts are short, with a threshold of 0 none is."""
    monkeypatch.setattr(kv_cache, "SHORT_PROMPT", request.param)
