"""Rollout backends: one file each, chosen by ``rollout.backend``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo.backends.base import Backend
    from grpo.config import Recipe
    from grpo.model.policy import Policy


def make_backend(recipe: Recipe, policy: Policy) -> Backend:
    """The backend that the recipe names, holding no weights yet: ``sync`` comes first."""
    if recipe.rollout.backend == "vllm":
        from grpo.backends.vllm.backend import VLLMBackend

        return VLLMBackend(policy, recipe)
    from grpo.backends.hf.backend import HFBackend

    rollout = recipe.rollout
    return HFBackend(policy, max_batch_size=rollout.max_batch_size, kv_cache_gb=rollout.kv_cache_gb)
