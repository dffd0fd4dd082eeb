"""A policy and a backend outside of a run, as the benchmarks of single parts need them."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from grpo.backends.hf.backend import HFBackend
from grpo.config import Recipe
from grpo.kernels import prepare_process
from grpo.model.loading import load_tokenizer
from grpo.model.policy import Policy


def make_policy(model: str, dtype: str) -> tuple[Policy, Recipe]:
    recipe = Recipe.model_validate(
        {
            "model": {"name": model, "dtype": dtype},
            "data": {"name": "countdown"},
            "rewards": [{"name": "countdown"}],
            "training": {"output_dir": "unused"},
        }
    )
    tokenizer = load_tokenizer(recipe.model)
    on_cpu = not torch.accelerator.is_available()
    prepare_process()  # as make_accelerator does
    accelerator = Accelerator(cpu=on_cpu)
    return Policy(recipe, accelerator, tokenizer, [tokenizer.eos_token_id], False), recipe


def make_backend(model: str, dtype: str) -> tuple[HFBackend, Policy]:
    policy, recipe = make_policy(model, dtype)
    backend = HFBackend(policy, max_batch_size=recipe.rollout.max_batch_size)
    backend.sync(policy, 0)
    return backend, policy
