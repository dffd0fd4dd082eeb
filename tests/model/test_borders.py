"""Rotary embeddings that depend on the longest row of a batch are refused where the recipe's rows may do that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.errors import UserError
from grpo.model.borders import check_rope, past_borders
from grpo.model.policy import Policy
from grpo.randomness import key
from grpo.types import Prompt, TrainedSequence
from tests.conftest import make_policy

SIZE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256}
SIZE |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
MSCALE = {"short_mscale": 1.1, "long_mscale": 1.3, "long_factor": [1.0] * 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
BY_LAYER = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "longrope's scale alone": (
        "phimoe",
        {"rope_parameters": LONGROPE | MSCALE, "original_max_position_embeddings": 64, "num_local_experts": 2},
    ),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "dynamic in layers of one type": (
        "gemma3_text",
        {"rope_parameters": BY_LAYER, "max_position_embeddings": 64, "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def policy_of(rope: str, folder: Path, prompt: int, completion: int) -> Policy:
    kind, settings = ROPES[rope]
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE | settings))
    lengths = {"data": {"max_prompt_length": prompt}, "rollout": {"max_completion_length": completion}}
    return make_policy(folder, causal_lm=causal_lm, **lengths)


@pytest.mark.parametrize("rope", ROPES)
def test_rows_that_pass_the_border_of_a_rope_are_refused(rope: str, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"65 tokens together\. Beyond 64, .*Lower data\.max_prompt_length"):
        policy_of(rope, tiny_model, 40, 25)


@pytest.mark.parametrize("rope", ROPES)
def test_rows_within_it_are_sampled_and_trained_as_the_model_computes_them_alone(rope: str, tiny_model: Path) -> None:
    policy = policy_of(rope, tiny_model, 40, 24)
    backend = HFBackend(policy, max_batch_size=8)
    backend.sync(policy, 0)
    requests = [Request(Prompt(i, "", "", [5 + j for j in range(n)]), [key(i, 0)]) for i, n in enumerate((4, 40))]
    completions = [group[0] for group in backend.generate(requests, Sampling(24), 0)]
    rows = [
        TrainedSequence(request.prompt.token_ids, c.token_ids, c.sampler_logprobs, 1.0)
        for request, c in zip(requests, completions, strict=True)
    ]
    assert max(map(len, rows)) > 60, "near the border"
    with torch.no_grad():
        together, alone = (policy.logprobs(policy.collate(batch), 1.0)[0] for batch in (rows, rows[:1]))
    for i, row in enumerate(rows):
        sampled = torch.tensor(row.sampler_logprobs)
        torch.testing.assert_close(together[i, : len(sampled)], sampled, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[0, : alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def test_the_checks_pass_every_border_that_rows_pass() -> None:
    config = LlamaConfig(**SIZE, rope_parameters=LONGROPE)
    assert past_borders(config, 64) == 0
    assert past_borders(config, 66) == 66
    assert past_borders(config, 1000) == 72
    config.sliding_window = 500
    assert past_borders(config, 1000) == 508


ASKED: list[str] = []


class SolarOpenDecoderLayer(nn.Module):
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        ASKED.append("layer")
        return hidden_states


def test_only_rotary_embeddings_are_asked_for_theirs() -> None:
    """SolarOpen's layers have "rope" inside of their names, and would be called with one number a token."""
    ASKED.clear()

    class YarnRoPE(nn.Module):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            ASKED.append("rope")
            return position_ids[..., None].float()

    check_rope(nn.Sequential(SolarOpenDecoderLayer(), YarnRoPE()), 40)  # type: ignore[arg-type]
    assert set(ASKED) == {"rope"}
