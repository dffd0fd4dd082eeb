"""The hf backend on real transformers models: what it samples, what it says of it, and where it stops."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import Choice, HFBackend
from grpo.backends.hf.step_graph import GraphStep
from grpo.errors import RunError
from grpo.model.policy import Policy
from grpo.randomness import key, uniforms
from grpo.types import Prompt, Status
from tests.backends.hf.recorder import Recorders
from tests.conftest import make_policy

QUESTIONS = ["6 3 9 = 27", "1 2 = 3", "( 1 + 2 ) * 3 + 4 + 5 = 18", "7", "8 8 8 8 = 32"]


def prompts(policy: Policy) -> list[Prompt]:
    encode = policy.tokenizer.encode
    return [Prompt(i, q, q, encode(q, add_special_tokens=False)) for i, q in enumerate(QUESTIONS)]


def requests(policy: Policy, G: int) -> list[Request]:
    return [Request(p, [key(0, p.id, g) for g in range(G)]) for p in prompts(policy)]


def synced(policy: Policy, max_batch_size: int = 512) -> HFBackend:
    backend = HFBackend(policy, max_batch_size=max_batch_size)
    backend.sync(policy, 0)
    return backend


def teacher_forced(policy: Policy, prompt: Prompt, token_ids: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities by transformers' own forward, no cache, batch of one."""
    ids = torch.tensor([prompt.token_ids + token_ids])
    policy.causal_lm.eval()
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1] / temperature
    return logits.float().log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("both_layouts", "both_steps")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logprobs_are_the_teacher_forced_ones(tiny_model: Path, temperature: float) -> None:
    policy = make_policy(tiny_model)
    completions = synced(policy).generate(requests(policy, 8), Sampling(40, temperature), 0)
    for prompt, group in zip(prompts(policy), completions, strict=True):
        for completion in group:
            expected = teacher_forced(policy, prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.sampler_logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("both_steps")
def test_a_large_batch_and_a_batch_of_one_differ_only_at_near_ties(tiny_model: Path) -> None:
    """Where the tokens first differ, the uniform lay within 1e-4 of a boundary of the cumulative distribution."""
    policy = make_policy(tiny_model, sharpen=6.0)
    wanted = requests(policy, 40)
    large = synced(policy).generate(wanted, Sampling(60), 0)
    alone = synced(policy, max_batch_size=1)
    differing = 0
    for request, group in zip(wanted, large, strict=True):
        for seed, completion in list(zip(request.keys, group, strict=True))[:3]:
            single = alone.generate([Request(request.prompt, [seed])], Sampling(60), 0)[0][0]
            assert single.status is completion.status or single.token_ids != completion.token_ids
            pairs = zip(single.token_ids, completion.token_ids, strict=False)
            at = next((t for t, (a, b) in enumerate(pairs) if a != b), None)
            if at is None:
                assert single.token_ids == completion.token_ids
                continue
            differing += 1
            ids = torch.tensor([request.prompt.token_ids + completion.token_ids[:at]])
            with torch.no_grad():
                cumulative = policy.causal_lm(input_ids=ids).logits[0, -1].double().softmax(-1).cumsum(-1)
            assert (cumulative - uniforms([seed], np.array([at]))[0, 0]).abs().min() < 1e-4
    assert differing <= 3  # near-ties are rare; many differences would be a fault of the draws


def test_stop_and_length_are_told_apart_and_the_stop_token_is_kept(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    policy.stop_token_ids = [5, 6, 40, 41, 42, 43, 44]  # several end-of-sequence tokens
    completions = synced(policy).generate(requests(policy, 30), Sampling(60), 0)
    everything = [c for group in completions for c in group]
    assert {c.status for c in everything} == {Status.STOP, Status.LENGTH}
    for c in everything:
        assert (c.token_ids[-1] in policy.stop_token_ids) is (c.status is Status.STOP)
        assert not set(c.token_ids[:-1]) & set(policy.stop_token_ids)
        assert len(c.token_ids) == len(c.sampler_logprobs) <= 60
        assert c.status is Status.STOP or len(c.token_ids) == 60
        assert [(s.start, s.end, s.version) for s in c.versions] == [(0, len(c.token_ids), 0)]


def test_stop_strings_end_a_completion_and_stay_in_it(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    completions = synced(policy).generate(requests(policy, 40), Sampling(80, stop=["7", "yes"]), 0)
    eos = policy.tokenizer.eos_token_id
    stopped = [c for g in completions for c in g if c.status is Status.STOP and c.token_ids[-1] != eos]
    assert stopped
    for c in stopped:
        assert "7" in c.text or "yes" in c.text
        earlier = policy.tokenizer.decode(c.token_ids[:-1])
        assert "7" not in earlier
        assert "yes" not in earlier


def test_the_batch_size_limit_changes_nothing_else(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    whole = synced(policy).generate(requests(policy, 6), Sampling(20), 0)
    pieces = synced(policy, max_batch_size=7).generate(requests(policy, 6), Sampling(20), 0)
    assert [[c.token_ids for c in g] for g in whole] == [[c.token_ids for c in g] for g in pieces]


def test_another_version_than_asked_for_is_refused_by_both_numbers(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    with pytest.raises(RunError, match=r"version 3.*version 0"):
        synced(policy).generate(requests(policy, 1), Sampling(4), 3)


def test_nothing_asked_nothing_generated(tiny_model: Path) -> None:
    assert synced(make_policy(tiny_model)).generate([], Sampling(4), 0) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_were_trained_must_be_synced(tiny_model: Path, dtype: str) -> None:
    """Also by a fused optimizer, of whose writing autograd knows nothing."""
    policy = make_policy(tiny_model, dtype=dtype)
    backend = synced(policy)
    for parameter in policy.causal_lm.parameters():
        parameter.grad = torch.ones_like(parameter)
    policy.step(1e-3)
    with pytest.raises(RunError, match="policy changed after its version 0 was synced"):
        backend.generate(requests(policy, 1), Sampling(4), 0)
    backend.sync(policy, 1)
    backend.generate(requests(policy, 1), Sampling(4), 1)


def test_a_bfloat16_policy_generates_from_its_own_copy_and_sync_updates_it(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, dtype="bfloat16")
    backend = synced(policy)
    assert backend.model is not policy.causal_lm
    assert next(backend.model.parameters()).dtype is torch.bfloat16
    before = backend.generate(requests(policy, 4), Sampling(20), 0)
    assert not any(parameter.untyped_storage().nbytes() for parameter in backend.model.parameters())
    assert backend.generate(requests(policy, 4), Sampling(20), 0) == before
    with torch.no_grad():
        for parameter in policy.causal_lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(RunError, match="policy changed after its version 0 was synced to the hf backend"):
        backend.generate(requests(policy, 4), Sampling(20), 0)
    backend.sync(policy, 1)
    after = backend.generate(requests(policy, 4), Sampling(20), 1)
    assert [c.token_ids for g in after for c in g] != [c.token_ids for g in before for c in g]


def test_graphs_cache_and_weights_stay_between_rollouts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with a recorder in place of CUDA graphs."""
    policy, recorders = make_policy(tiny_model, dtype="bfloat16"), Recorders(monkeypatch)
    by_graph = Choice(lambda model: GraphStep(model, recorders), "recorded")
    monkeypatch.setattr(HFBackend, "_choose_step", lambda self: by_graph)
    monkeypatch.setattr("grpo.backends.hf.backend.packed_linears", nullcontext)  # it is for CPUs, and copies weights
    backend = synced(policy)
    wanted, made = requests(policy, 6), []
    for version in range(3):
        backend.sync(policy, version)
        fresh = HFBackend(policy, max_batch_size=512)
        fresh.sync(policy, version)
        sampling = Sampling(30 - version)
        found, expected = (each.generate(wanted, sampling, version) for each in (backend, fresh))
        assert [[c.token_ids for c in g] for g in found] == [[c.token_ids for c in g] for g in expected]
        assert backend.kept is not None
        made.append((backend.kept[0], [p.data_ptr() for p in backend.model.parameters()]))
        with torch.no_grad():
            for parameter in policy.causal_lm.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert all(cache is made[0][0] and addresses == made[0][1] for cache, addresses in made)
    longer = backend._cache_and_step(replace(made[0][0].shape, sequence_tokens=999))
    assert longer[0] is not made[0][0]  # graphs of a cache that is too small are given up
    monkeypatch.setattr("grpo.backends.hf.backend.KEPT_SHARE", 1e-12)
    backend.kept = None
    backend.sync(policy, 3)
    backend.generate(wanted, Sampling(30), 3)
    assert backend.kept is None  # too large: memory is for the update
    assert not any(p.untyped_storage().nbytes() for p in backend.model.parameters())


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
KINDS = {
    "qwen2": SMALL | {"num_key_value_heads": 2},
    "qwen3": SMALL | {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 128},
    "gemma2": SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "mistral": SMALL | {"num_key_value_heads": 2, "sliding_window": 16},
    "phi3": SMALL | {"num_key_value_heads": 2, "pad_token_id": 0},
}


@pytest.mark.usefixtures("both_layouts")
@pytest.mark.parametrize("kind", KINDS)
def test_any_attention_model_of_transformers(tiny_model: Path, kind: str) -> None:
    """Grouped heads, no grouping, sliding windows, soft-capped logits: sampler and teacher-forced agree."""
    config = AutoConfig.for_model(kind, eos_token_id=1, bos_token_id=None, **KINDS[kind])
    torch.manual_seed(0)
    policy = make_policy(tiny_model, causal_lm=AutoModelForCausalLM.from_config(config))
    ids = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15]]
    wanted = [Request(Prompt(i, "", "", p), [key(i, g) for g in range(5)]) for i, p in enumerate(ids)]
    completions = synced(policy).generate(wanted, Sampling(40), 0)
    for request, group in zip(wanted, completions, strict=True):
        for completion in group:
            expected = teacher_forced(policy, request.prompt, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.sampler_logprobs), expected, atol=1e-4, rtol=0)
