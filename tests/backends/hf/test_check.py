"""The check at start: a model that the engine decodes otherwise than it computes is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.backends.hf.check import cache_bytes, check_decoding
from grpo.backends.hf.engine import step_through_transformers
from grpo.errors import RunError
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
    with pytest.raises(RunError, match=r"GPT2LMHeadModel decodes to other logits.*rollout\.backend: vllm"):
        check_decoding(scored, cpu, step)
