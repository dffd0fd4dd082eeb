"""Models with recurrent layers: what is sampled through transformers' caches is what they compute, and they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.backends.base import Request, Sampling
from grpo.backends.hf import own_cache
from grpo.backends.hf.backend import HFBackend
from grpo.errors import RunError, UserError
from grpo.model.policy import Policy
from grpo.randomness import key
from grpo.types import Completion, Prompt, TrainedSequence
from grpo.update.step import optimizer_step
from tests.conftest import make_policy, make_run

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
CONV = {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": ("qwen3_5_text", SMALL | DELTA),
    "qwen3-next": ("qwen3_next", SMALL | DELTA | EXPERTS | {"num_experts_per_tok": 2}),
    "lfm2": ("lfm2", SMALL | CONV),
    "lfm2 with biases": ("lfm2", SMALL | CONV | {"conv_bias": True}),
}
REQUESTS = [
    Request(Prompt(i, "", "", [(7 * i + j) % 90 + 3 for j in range(length)]), [key(i, g) for g in range(3)])
    for i, length in enumerate([4, 11, 4, 7])
]


def hybrid(name: str, folder: Path) -> Policy:
    kind, settings = HYBRIDS[name]
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter_name, parameter in causal_lm.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
            elif parameter_name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return make_policy(folder, causal_lm=causal_lm)


def generate(policy: Policy, requests: list[Request], *, most: int = 64) -> list[list[Completion]]:
    backend = HFBackend(policy, max_batch_size=most)
    backend.sync(policy, 0)
    return backend.generate(requests, Sampling(9), 0)


def trained(requests: list[Request], groups: list[list[Completion]]) -> list[TrainedSequence]:
    return [
        TrainedSequence(request.prompt.token_ids, c.token_ids, c.sampler_logprobs, (-1.0) ** g)
        for request, group in zip(requests, groups, strict=True)
        for g, c in enumerate(group)
    ]


def off(policy: Policy, sequences: list[TrainedSequence]) -> float:
    """How far the update's log-probabilities are from the sampler's, at most. Each row alone, and all padded."""
    found = 0.0
    for batch in [sequences, *([s] for s in sequences)]:
        tensors = policy.collate(batch)
        with torch.no_grad():
            logps_BT = policy.logprobs(tensors, 1.0)[0]
        found = max(found, float(((logps_BT - tensors.sampler_logps_BT) * tensors.mask_BT).abs().max()))
    return found


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_samples_what_it_computes_and_trains_two_steps(
    name: str, tiny_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several lengths share a batch unless padding would enter a state, and rows leave as they end."""
    caplog.set_level("INFO", "grpo")
    policy = hybrid(name, tiny_model)
    monkeypatch.setattr(policy, "stop_token_ids", [1, 5, 9, 20, 33, 50, 77])  # so that completions end at all lengths
    assert not policy.packed
    groups = generate(policy, REQUESTS)
    assert "through transformers' own cache" in caplog.text
    assert ("padding enters its state" in caplog.text) == (name == "lfm2 with biases")
    lengths = {len(c.token_ids) for group in groups for c in group}
    assert len(lengths) > 2, "rows leave before the others"
    sequences = trained(REQUESTS, groups)
    assert off(policy, sequences) < 2e-5
    for request, group in zip(REQUESTS, groups, strict=True):  # whatever the batch
        assert [c.token_ids for c in generate(policy, [request], most=2)[0]] == [c.token_ids for c in group]

    run = make_run(policy, rollout={"max_completion_length": 9})
    backend = HFBackend(policy, max_batch_size=8)
    for version in (1, 2):
        before = [p.detach().clone() for p in policy.causal_lm.parameters()]
        assert optimizer_step(run, sequences, 1e-2)["grad_norm"] > 0
        named = zip(policy.causal_lm.named_parameters(), before, strict=True)
        assert [n for (n, p), old in named if p.equal(old) and "experts" not in n] == [], "all have gradients"
        backend.sync(policy, version)
        sequences = trained(REQUESTS, backend.generate(REQUESTS, Sampling(9), version))
        assert off(policy, sequences) < 1e-4


def test_a_cache_that_holds_no_sequence_is_refused(tiny_model: Path) -> None:
    backend = HFBackend(hybrid("lfm2", tiny_model), max_batch_size=8, kv_cache_gb=1e-6)
    backend.sync(backend.policy, 0)
    with pytest.raises(UserError, match=r"rollout.kv_cache_gb: 1e-06 GB do not hold one sequence of 20 tokens"):
        backend.generate(REQUESTS, Sampling(9), 0)


def test_a_batch_is_as_large_as_the_cache_allows(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = hybrid("qwen3.5", tiny_model)
    sizes: list[int] = []
    take = own_cache.Rows.take
    monkeypatch.setattr(own_cache.Rows, "take", lambda self, rows: (sizes.append(len(rows)), take(self, rows)))
    backend = HFBackend(policy, max_batch_size=64)
    backend.sync(policy, 0)
    state, token = backend.own_cache.state, backend.own_cache.token
    # Two layers of states (2 x 8 x 8 + ... ) and one of keys and values, in float32.
    assert token == 2 * 2 * 8 * 4
    assert state == 2 * 4 * (4 * 8 * 8 + (2 * 2 * 8 + 4 * 8) * 4)
    backend.cache_budget = 5.5 * (state + 20 * token)
    sizes.clear()
    backend.generate(REQUESTS, Sampling(9), 0)
    assert max(sizes) == 5


def test_a_model_that_decodes_otherwise_through_its_cache_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, take = hybrid("lfm2", tiny_model), own_cache.Rows.take
    monkeypatch.setattr(own_cache.Rows, "take", lambda self, rows: (take(self, rows), self.cache.layers[0].reset()))
    with pytest.raises(RunError, match=r"Lfm2ForCausalLM decodes to other logits through its cache"):
        HFBackend(policy, max_batch_size=8)
