"""Today's models, tiny and with random weights: each samples what it computes and trains two steps with the hf backend.

``FAMILIES`` says how rows are computed in the update, and how a decoding step is made on a CPU with a compiler. What
``final/`` computes, LoRA and all other architectures are in tests/test_families.py and docs/models.md.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.model.policy import Policy
from grpo.randomness import key
from grpo.types import Completion, Prompt, TrainedSequence
from grpo.update.step import optimizer_step
from tests.conftest import make_policy, make_run

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
CONV = {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}


class Family(NamedTuple):
    """transformers' name of the model, settings of its own, and what the log says of it."""

    kind: str
    settings: dict[str, Any]
    update: str
    decoding: str


OWN_CACHE = "through transformers' own cache, slower, because the model has recurrent layers"
FAMILIES = {
    "Qwen2.5": Family("qwen2", {}, "packed", "one compiled call"),
    "Qwen3": Family("qwen3", {}, "packed", "one compiled call"),
    "SmolLM3": Family("smollm3", {"no_rope_layers": [1, 1, 0]}, "packed", "through transformers"),
    "Llama 3.2": Family("llama", {"rope_parameters": LLAMA3}, "packed", "one compiled call"),
    "Gemma 3": Family("gemma3_text", WINDOW | {"query_pre_attn_scalar": 32}, "padded", "through transformers"),
    "Qwen3.5": Family("qwen3_5_text", DELTA, "padded", OWN_CACHE),
    "Qwen3-Next": Family("qwen3_next", DELTA | EXPERTS | {"num_experts_per_tok": 2}, "padded", OWN_CACHE),
    "LFM2": Family("lfm2", CONV, "padded", OWN_CACHE),
    "LFM2 with biases": Family("lfm2", CONV | {"conv_bias": True}, "padded", f"{OWN_CACHE}, prompts of equal length"),
}
REQUESTS = [
    Request(Prompt(i, "", "", [(7 * i + j) % 90 + 3 for j in range(length)]), [key(i, g) for g in range(3)])
    for i, length in enumerate([4, 11, 4, 7])
]


def policy_of(name: str, folder: Path) -> Policy:
    family = FAMILIES[name]
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.kind, **SMALL | family.settings))
    with torch.no_grad():
        for parameter_name, parameter in causal_lm.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
            elif parameter_name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return make_policy(folder, causal_lm=causal_lm)


def trained(requests: list[Request], groups: list[list[Completion]]) -> list[TrainedSequence]:
    return [
        TrainedSequence(request.prompt.token_ids, c.token_ids, c.sampler_logprobs, (-1.0) ** g)
        for request, group in zip(requests, groups, strict=True)
        for g, c in enumerate(group)
    ]


def texts(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in groups]


def off(policy: Policy, sequences: list[TrainedSequence]) -> float:
    """How far the update's log-probabilities are from the sampler's, at most. Each row alone, and all padded."""
    found = 0.0
    for batch in [sequences, *([s] for s in sequences)]:
        tensors = policy.collate(batch)
        with torch.no_grad():
            logps_BT = policy.logprobs(tensors, 1.0)[0]
        found = max(found, float(((logps_BT - tensors.sampler_logps_BT) * tensors.mask_BT).abs().max()))
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="without one rows are padded")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_samples_what_it_computes_and_trains_two_steps(
    name: str, tiny_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several lengths share a batch unless padding would enter a state, and rows leave as they end."""
    caplog.set_level("INFO", "grpo")
    policy = policy_of(name, tiny_model)
    monkeypatch.setattr(policy, "stop_token_ids", [1, 5, 9, 20, 33, 50, 77])  # so that completions end at all lengths
    backend, run = HFBackend(policy, max_batch_size=64), make_run(policy, rollout={"max_completion_length": 9})

    def generate(requests: list[Request], version: int) -> list[list[Completion]]:
        backend.sync(policy, version)
        return backend.generate(requests, Sampling(9), version)

    groups = generate(REQUESTS, 0)
    family = FAMILIES[name]
    assert f"update: {family.update} rows" in caplog.text
    assert f"decoding: {family.decoding}" in caplog.text
    assert ("padding enters its state" in caplog.text) == (name == "LFM2 with biases")
    assert len({len(c.token_ids) for group in groups for c in group}) > 2, "rows leave before the others"
    sequences = trained(REQUESTS, groups)
    assert off(policy, sequences) < 2e-5
    backend.max_batch_size = 2
    assert texts(generate(REQUESTS[1:2], 0)) == texts(groups[1:2]), "whatever the batch"
    backend.max_batch_size = 64
    for version in (1, 2):
        before = [p.detach().clone() for p in policy.causal_lm.parameters()]
        assert optimizer_step(run, sequences, 1e-2)["grad_norm"] > 0
        named = zip(policy.causal_lm.named_parameters(), before, strict=True)
        assert [n for (n, p), old in named if p.equal(old) and "experts" not in n] == [], "all have gradients"
        sequences = trained(REQUESTS, generate(REQUESTS, version))
        assert off(policy, sequences) < 1e-4
