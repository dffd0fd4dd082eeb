"""The hf engine on a GPU, without numbers: prompts, decoding steps as they are and as a CUDA graph, and drawing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.backends.hf import attention, flash, step_graph
from grpo.backends.hf.attention import decoding_into
from grpo.backends.hf.check import PROMPT_LENGTHS, ROOM, _prefill, _tokens_at, made_up_ids
from grpo.backends.hf.draw import Distribution, sample
from grpo.backends.hf.engine import NextLogits, step_through_transformers
from grpo.backends.hf.kv_cache import DecodeCache
from grpo.backends.hf.step_graph import GraphStep
from grpo.model.logprob_lm import LogprobLM
from tests.fake_cuda.device import WaitsForTheHost, Watch, causal_lm
from tests.fake_cuda.models import CONFIGS, TRIED

CUDA = torch.device("cuda")


class Captures:
    """Stands in for CUDA graphs: a capture that reads or writes the host's memory fails; a replay does nothing."""

    def __init__(self, watch: Watch):
        self.watch, self.made = watch, 0

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        with self.watch.graph():
            compute()
        self.made += 1
        return lambda: None


def decode(watch: Watch, name: str, make_step: Callable[[LogprobLM], NextLogits]) -> torch.Tensor:
    """Prompts, some steps, and a token drawn of each sequence after the last. Returns its log-probabilities."""
    model = LogprobLM(causal_lm(CONFIGS[name], torch.bfloat16)).eval()
    watch.products.clear()
    with torch.no_grad():
        ids, cache = made_up_ids(model, CUDA), DecodeCache(ROOM, CUDA)
        with decoding_into(model.causal_lm, cache):
            watch.may_make_masks = True
            _prefill(model, cache, ids, PROMPT_LENGTHS)
            watch.may_make_masks = False
            step = make_step(model)
            for t in range(3):
                logits_BV = step(_tokens_at(ids, t, PROMPT_LENGTHS), cache)
        uniforms_B = torch.zeros(len(logits_BV), dtype=torch.float64).to(CUDA)
        tokens_B, logps_B = sample(logits_BV, uniforms_B, temperature=0.7, top_k=20, top_p=0.9)
    assert (tokens_B.device.type, tokens_B.dtype) == ("cuda", torch.int64)
    return logps_B


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_steps_through_transformers(watch: Watch, name: str) -> None:
    logps_B = decode(watch, name, lambda model: partial(step_through_transformers, model))
    assert (logps_B.device.type, logps_B.dtype) == ("cuda", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_steps_as_graphs(watch: Watch, name: str) -> None:
    """Attention by each row's own length where its kernel serves the model, and under a mask."""
    for by_length in {flash.why_not(SimpleNamespace(config=CONFIGS[name]), CUDA, torch.bfloat16) is None, False}:
        captures = Captures(watch)
        logps_B = decode(watch, name, partial(GraphStep, capture=captures, by_length=by_length))
        assert (logps_B.device.type, logps_B.dtype) == ("cuda", torch.float32)
        assert captures.made == 1


def test_a_graph_that_draws(watch: Watch) -> None:
    captures, drawn = Captures(watch), []

    def make_step(model: LogprobLM) -> NextLogits:
        step = GraphStep(model, captures, by_length=True)

        def both(tokens_B: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
            uniforms_B = torch.zeros(len(tokens_B), dtype=torch.float64).to(CUDA)
            drawn.append(step.next_tokens(Distribution(0.7, 20, 0.9, 0.01), tokens_B, uniforms_B, cache))
            return step(tokens_B, cache)

        return both

    decode(watch, "small", make_step)
    assert {(x.device.type, x.dtype) for pair in drawn for x in pair} == {
        ("cuda", torch.int64),
        ("cuda", torch.float32),
    }
    assert captures.made == 2


def planted(mistake: Callable[[Any], Any]) -> Callable[..., torch.Tensor]:
    found = step_graph.mask_after
    return lambda lengths_N, width: mistake(found(lengths_N, width))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x.cpu().to(CUDA),
        lambda x: x.cpu(),
        lambda x: x + torch.zeros(x.shape).to(CUDA),
        lambda x: torch.tensor([[0.0] * x.shape[1]] * x.shape[0], device=CUDA),
        lambda x: x * x.sum().item(),
        lambda x: x if x.isfinite().all() else x * 0,
        lambda x: x[x[:, 0] == 0],
        lambda x: x[:, x.tolist()],
    ],
    ids=["there and back", "cpu", "a mask from the host", "a list", "item", "bool", "booleans", "tolist"],
)
def test_a_graph_is_red_for(watch: Watch, mistake: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "mask_after", planted(mistake))
    with pytest.raises(Exception) as raised:  # noqa: PT011  # each in torch's own way
        decode(watch, "small", lambda model: GraphStep(model, Captures(watch)))
    assert not isinstance(raised.value, AssertionError) or isinstance(raised.value, WaitsForTheHost)


def test_it_is_red_for_a_query_in_float32(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    found = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda query, *rest: found(query.float(), *rest))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        decode(watch, "small", lambda model: GraphStep(model, Captures(watch)))
