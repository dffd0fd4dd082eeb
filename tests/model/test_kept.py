"""What a model holds in float32 on purpose stays so in every copy in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.tiny import write_tiny_model
from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.types import Prompt
from tests.conftest import make_policy
from tests.small_models import LATENT, SMALL

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
EXPERTS |= {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "named, a buffer": ("deepseek_v3", SMALL | EXPERTS | LATENT, "gate.e_score_correction_bias"),
    "named for half types, weights": ("gpt_oss", SMALL | EXPERTS, "input_layernorm.weight"),
    "made in float32": ("glm4_moe", SMALL | EXPERTS, "gate.e_score_correction_bias"),
    "a buffer of a file": ("minimax_m2", SMALL | EXPERTS, "e_score_correction_bias"),
    "none": ("llama", SMALL, "nothing"),
}
REQUESTS = [Request(Prompt(0, "", "", [5, 60, 7, 80, 9]), [3, 4])]


def written(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    write_tiny_model(folder)
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    with torch.no_grad():
        for tensor in causal_lm.state_dict().values():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.rand(tensor.shape))
    causal_lm.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_copies_in_bfloat16_keep_what_the_model_keeps_in_float32(case: str, tmp_path: Path) -> None:
    kind, settings, ending = CASES[case]
    folder = written(tmp_path / "model", kind, settings)
    policy = make_policy(folder, dtype="bfloat16", needs_reference=True)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    names = {name for name in exact if name.endswith(ending)}
    assert bool(names) == (ending != "nothing")
    assert all(not torch.equal(exact[name], exact[name].bfloat16().float()) for name in names), "rounding would show"
    assert names <= policy.kept.keys()

    backend = HFBackend(policy, max_batch_size=4)
    backend.sync(policy, 0)
    assert len(backend.generate(REQUESTS, Sampling(4), 0)[0]) == 2
    policy.save_pretrained(tmp_path / "final")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).state_dict()
    states = {"reference": policy.reference.causal_lm.state_dict(), "final/": final}
    with backend._weights():
        states["sampler"] = {name: tensor.clone() for name, tensor in backend.model.state_dict().items()}
    for where, state in states.items():
        for name, tensor in state.items():
            expected = exact[name] if name in policy.kept else exact[name].bfloat16().float()
            assert torch.equal(tensor.float(), expected), f"{where}: {name}"


@pytest.mark.slow
def test_a_copy_is_checked_with_the_policy_s_numbers(tmp_path: Path) -> None:
    """Memory that nobody wrote to may hold nan, and a model with recurrent layers was refused for it."""
    settings = SMALL | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    policy = make_policy(written(tmp_path / "model", "lfm2", settings), dtype="bfloat16")
    empty = policy.empty_copy

    def hostile(dtype: torch.dtype) -> Any:
        twin = empty(dtype)
        for parameter in twin.parameters():
            parameter.fill_(float("nan"))
        return twin

    policy.empty_copy = hostile  # type: ignore[method-assign]
    backend = HFBackend(policy, max_batch_size=4)
    backend.sync(policy, 0)
    assert len(backend.generate(REQUESTS, Sampling(4), 0)[0]) == 2
