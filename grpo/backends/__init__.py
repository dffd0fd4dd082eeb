"""Rollout backends: one file or folder each, chosen by ``rollout.backend``; ``own`` holds what loads one of the user's.

Others take ``make_backend`` and, before anything heavy is loaded, ``find_backend``; from ``base`` the protocol, and
what a backend is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.user_code import is_place

if TYPE_CHECKING:
    from grpo.backends.base import Backend
    from grpo.config import Recipe, RolloutConfig
    from grpo.model.policy import Policy


def find_backend(rollout: RolloutConfig) -> None:
    """Raise UserError where ``rollout.backend`` names a backend of the user's own that cannot be one."""
    if is_place(rollout.backend):
        from grpo.backends.own import load_backend

        load_backend(rollout)


def make_backend(recipe: Recipe, policy: Policy) -> Backend:
    """The backend that the recipe names, holding no weights yet: ``sync`` comes first."""
    rollout = recipe.rollout
    if is_place(rollout.backend):
        from grpo.backends.own import make_own_backend

        return make_own_backend(policy, rollout)
    if rollout.backend == "vllm":
        from grpo.backends.vllm.backend import VLLMBackend

        return VLLMBackend(policy, recipe)
    from grpo.backends.hf.backend import HFBackend

    return HFBackend(policy, max_batch_size=rollout.max_batch_size, kv_cache_gb=rollout.kv_cache_gb)
