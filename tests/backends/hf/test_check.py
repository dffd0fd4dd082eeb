"""The check at start: a model that the engine decodes otherwise than it computes is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.backends.hf.check import cache_bytes, check_decoding
from grpo.backends.hf.engine import step_through_transformers
from grpo.errors import UserError
from grpo.model.borders import past_borders
from grpo.model.logprob_lm import LogprobLM

pytestmark = pytest.mark.usefixtures("both_layouts")


def test_a_model_that_decodes_otherwise_than_it_computes_is_refused() -> None:
    """One that ignores the positions it is given stands for all that the check is there to catch."""
    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=128, bos_token_id=None, eos_token_id=1
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    scored, cpu = LogprobLM(model), torch.device("cpu")
    step = partial(step_through_transformers, scored)
    check_decoding(scored, cpu, step)
    assert cache_bytes(scored, cpu) == 2 * 2 * 32 * 4
    forward = model.base_model.forward
    model.base_model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UserError, match=r"GPT2LMHeadModel decodes to other logits.*rollout\.backend: vllm"):
        check_decoding(scored, cpu, step)


def test_a_window_that_only_rows_beyond_the_usual_check_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of chunks of 60 tokens, the check sees nothing on its rows of 44; where rows may have 100, it passes them."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    kinds = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 60}
    small = {"vocab_size": 97, "num_hidden_layers": 2, "head_dim": 32, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **sizes | experts | kinds | small))
    scored, cpu = LogprobLM(model.eval()), torch.device("cpu")
    step, beyond = partial(step_through_transformers, scored), past_borders(model.config, 100)
    assert beyond == 68
    check_decoding(scored, cpu, step, beyond)
    monkeypatch.setattr("grpo.backends.hf.attention._chunk_of", lambda _: None)
    check_decoding(scored, cpu, step)
    with pytest.raises(UserError, match="decodes to other logits"):
        check_decoding(scored, cpu, step, beyond)


def test_a_layer_that_makes_a_mask_of_its_own_is_refused() -> None:
    """A decoding step has its own masks, and would ignore it; at random weights too little to show in logits."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = {"vocab_size": 97, "num_hidden_layers": 2, "head_dim": 32, "eos_token_id": 1, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", **sizes | small)).eval()
    scored = LogprobLM(model)
    with pytest.raises(UserError, match=r"DogeForCausalLM can't be decoded.*makes masks of its own.*backend: vllm"):
        check_decoding(scored, torch.device("cpu"), partial(step_through_transformers, scored))
