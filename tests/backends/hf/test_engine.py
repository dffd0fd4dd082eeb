"""The engine's queue and its memory: places that are filled again, preemption, prompts held once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.backends.hf.budget import Budget
from grpo.backends.hf.draw import Distribution
from grpo.backends.hf.engine import Engine, NextLogits, drawing, step_through_transformers
from grpo.backends.hf.kv_cache import DecodeCache
from grpo.backends.hf.step_compiled import DecodeStep, why_not
from grpo.backends.sequence import SampledSequence
from grpo.errors import RunError
from grpo.model.logprob_lm import LogprobLM
from grpo.model.policy import Policy
from grpo.randomness import key
from grpo.types import Prompt
from tests.conftest import make_policy

LIMIT = 96
pytestmark = pytest.mark.usefixtures("both_layouts", "both_steps")


def requests(policy: Policy, prompts: int, G: int) -> list[Request]:
    """Prompts of unequal lengths."""
    ids = [[5 + (7 * i + j) % 40 for j in range(3 + 2 * i)] for i in range(prompts)]
    return [Request(Prompt(i, "", "", t), [key(0, i, g) for g in range(G)]) for i, t in enumerate(ids)]


def step_of(policy: Policy) -> NextLogits:
    if why_not(policy.causal_lm) is None:
        return DecodeStep(policy.causal_lm)
    return partial(step_through_transformers, LogprobLM(policy.causal_lm))


def decode(policy: Policy, wanted: list[Request], *, sequences: int = 512, tokens: int = 10**6) -> tuple[dict, Engine]:
    """Completions by (request, sample), and what made them."""
    budget = Budget.of(wanted, LIMIT, sequences, tokens)
    engine = Engine(
        LogprobLM(policy.causal_lm),
        wanted,
        Sampling(LIMIT),
        lambda key, ids: ids[-1] in policy.stop_token_ids,
        budget=budget,
        cache=DecodeCache(budget.first_shape(), policy.device),
        next_tokens=drawing(step_of(policy), Distribution()),
    )
    policy.causal_lm.eval()
    with torch.no_grad():
        found = {(sequence.request, sequence.sample): sequence for sequence in engine.run()}
    return found, engine


def ids(found: dict[tuple[int, int], SampledSequence]) -> dict[tuple[int, int], list[int]]:
    return {at: sequence.tokens for at, sequence in found.items()}


def logprobs_agree(policy: Policy, wanted: list[Request], found: dict[tuple[int, int], SampledSequence]) -> None:
    """Every sampled token's log-probability is that of a forward pass over the whole sequence alone."""
    for (request, _), sequence in found.items():
        prompt = wanted[request].prompt.token_ids
        with torch.no_grad():
            logits = policy.causal_lm(input_ids=torch.tensor([prompt + sequence.tokens])).logits[
                0, len(prompt) - 1 : -1
            ]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [2, 7])
def test_places_that_become_free_are_filled_from_the_queue(tiny_model: Path, sequences: int) -> None:
    policy = make_policy(tiny_model)
    wanted = requests(policy, 5, 4)
    everything, _ = decode(policy, wanted)
    few, engine = decode(policy, wanted, sequences=sequences)
    assert ids(few) == ids(everything)
    assert engine.cache.shape.sequences == sequences
    assert {len(sequence.tokens) for sequence in few.values()} > {LIMIT}  # some ended early, so that places were filled
    logprobs_agree(policy, wanted, few)


@pytest.mark.slow
def test_where_memory_runs_out_the_youngest_are_preempted_and_nothing_else_changes(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    policy.stop_token_ids = [40]  # seldom: completions grow long
    wanted = requests(policy, 6, 8)
    everything, unbounded = decode(policy, wanted)
    assert unbounded.preemptions == 0
    bounded, engine = decode(policy, wanted, tokens=600)
    assert engine.preemptions > 0
    assert engine.cache.shape.tokens() <= 600
    assert ids(bounded) == ids(everything)
    logprobs_agree(policy, wanted, bounded)


@pytest.mark.slow
def test_a_prompt_is_computed_once_for_all_of_its_completions(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    wanted = requests(policy, 4, 8)
    widths = []
    hook = policy.causal_lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    decode(policy, wanted)
    hook.remove()
    assert [shape for shape in widths if shape[1] > 1] == [(4, 9)]


@pytest.mark.slow
def test_groups_are_reported_once_each_when_their_last_completion_ends(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    backend = HFBackend(policy, max_batch_size=10)
    backend.sync(policy, 0)
    wanted = requests(policy, 6, 5)
    seen: list[tuple[int, list]] = []
    found = backend.generate(wanted, Sampling(LIMIT), 0, lambda place, group: seen.append((place, list(group))))
    assert sorted(place for place, _ in seen) == list(range(6))
    assert all(group == found[place] for place, group in seen)


def test_nan_logits_end_the_run_with_a_message(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(RunError, match="logits are nan"):
        decode(policy, requests(policy, 1, 2))
