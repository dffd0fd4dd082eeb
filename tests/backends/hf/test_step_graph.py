"""Decoding steps at fixed sizes and addresses: a recorder of torch's calls stands in for a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.backends.base import Request, Sampling
from grpo.backends.hf import flash, kv_cache
from grpo.backends.hf.budget import Budget
from grpo.backends.hf.check import check_decoding
from grpo.backends.hf.draw import Distribution
from grpo.backends.hf.engine import Engine, NextLogits, drawing, step_through_transformers
from grpo.backends.hf.kv_cache import DecodeCache, Shape
from grpo.backends.hf.step_graph import GraphStep, Size
from grpo.backends.sequence import SampledSequence
from grpo.errors import UserError
from grpo.model.logprob_lm import LogprobLM
from grpo.randomness import key
from grpo.types import Prompt
from tests.answering import Answering, by_place
from tests.backends.hf.recorder import Recorders

PLAINLY = Distribution()
pytestmark = pytest.mark.usefixtures("both_layouts")
V, LIMIT = 97, 90
SMALL = {"vocab_size": V, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
LLAMA = SMALL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "llama": LLAMA | {"num_key_value_heads": 2},
    "qwen2": LLAMA | {"num_key_value_heads": 1},
    "gpt2": SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gemma2": LLAMA | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 24},  # windows: keys are spread
}


def make(kind: str) -> LogprobLM:
    torch.manual_seed(0)
    return LogprobLM(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind])).eval())


def ends(key: int, ids: list[int]) -> bool:
    return ids[-1] % 29 == 1  # now and then, so that places become free and the queue moves up


@torch.no_grad()
def decode(
    model: LogprobLM,
    step: NextLogits,
    *,
    sequences: int = 512,
    tokens: int = 10**6,
    distribution: Distribution = PLAINLY,
    cache: DecodeCache | None = None,
    round: int = 0,
    turns: Answering | None = None,
) -> dict[tuple[int, int], SampledSequence]:
    """Completions by (request, sample) of prompts of unequal lengths. ``cache`` is one that an earlier rollout left."""
    ids = [[5 + (7 * i + j) % 40 for j in range(3 + 3 * i)] for i in range(5)]
    wanted = [Request(Prompt(i, "", "", t), [key(round, i, g) for g in range(5)]) for i, t in enumerate(ids)]
    budget = Budget.of(wanted, LIMIT + (turns.max_environment_tokens if turns else 0), sequences, tokens)
    if cache is None:
        cache = DecodeCache(budget.first_shape(), torch.device("cpu"))
    cache.empty()
    by_graph = isinstance(step, GraphStep)
    engine = Engine(
        model,
        wanted,
        Sampling(LIMIT, **distribution._asdict()),
        ends,
        budget=budget,
        cache=cache,
        next_tokens=partial(step.next_tokens, distribution) if by_graph else drawing(step, distribution),
        turns=turns,
    )
    return {(sequence.request, sequence.sample): sequence for sequence in engine.run()}


def same(found: dict[tuple[int, int], SampledSequence], expected: dict[tuple[int, int], SampledSequence]) -> None:
    assert {at: s.tokens for at, s in found.items()} == {at: s.tokens for at, s in expected.items()}
    for at, sequence in found.items():
        expected_T = torch.tensor(expected[at].logprobs)
        torch.testing.assert_close(torch.tensor(sequence.logprobs), expected_T, atol=1e-5, rtol=0)


keys_read: list[int] = []  # by the operation below


@torch.library.custom_op("grpo_test::ragged_attention", mutates_args=())
def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cq: torch.Tensor,
    ck: torch.Tensor,
    used: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch's flash kernel computes, by a plain loop over batch entries."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for e, n in enumerate(used.tolist()):
        assert 0 < n <= ck[e + 1] - ck[e]
        keys_read.append(n)
        rows, keys = slice(cq[e], cq[e + 1]), slice(ck[e], ck[e] + n)
        scores_hQK = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale
        out[rows] = torch.einsum("hqk,khd->qhd", scores_hQK.softmax(-1), v[keys])
        lse[:, rows] = scores_hQK.logsumexp(-1)
    return out, lse


def stand_in_for_flash(*given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Called as the kernel is, which is for GPUs."""
    parameters = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    assert set(named) <= set(parameters)
    call = dict(zip(parameters, given, strict=False)) | named
    assert (call["dropout_p"], call["is_causal"], call["return_debug_mask"]) == (0.0, False, False)
    lengths = call["cum_seq_q"], call["cum_seq_k"], call["seqused_k"]
    assert {x.dtype for x in lengths} == {torch.int32}
    return ragged_attention(call["query"], call["key"], call["value"], *lengths, call["scale"])


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "kernel", lambda: stand_in_for_flash)
    keys_read.clear()


ROOMS = {"all": {}, "queue": {"sequences": 7}, "preemption": {"sequences": 9, "tokens": 600}}


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_are_those_of_steps_through_transformers(
    kind: str, room: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recorders = make(kind), Recorders(monkeypatch)
    expected = decode(model, partial(step_through_transformers, model), **room)
    same(decode(model, GraphStep(model, recorders), **room), expected)
    replays = sum(recorder.replayed for recorder in recorders.made)
    assert replays > 3 * len(recorders.made) > 0  # most steps are replays


@pytest.mark.slow
@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_rollouts_are_the_same_where_attention_goes_by_length(
    kind: str, room: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recorders = make(kind), Recorders(monkeypatch)
    expected = decode(model, partial(step_through_transformers, model), **room)
    same(decode(model, GraphStep(model, recorders, by_length=True), **room), expected)
    assert keys_read
    assert recorders.made


@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize("by_length", [False, True])
def test_what_a_graph_computes_beyond_the_running_sequences_is_nothing_that_waits(
    by_length: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that wait for an answer stand where a graph computes for nobody; so do bursts, as on a GPU."""
    model = make("llama")
    rule = {"reply": by_place, "overlap_steps": 6}
    expected = decode(model, partial(step_through_transformers, model), turns=Answering(**rule))
    monkeypatch.setattr("grpo.backends.hf.engine.BURST", {"cpu": 3})
    step, turns = GraphStep(model, Recorders(monkeypatch), by_length=by_length), Answering(**rule)
    same(decode(model, step, turns=turns), expected)
    assert len(turns.asked) > 60


@pytest.mark.usefixtures("flash_on_cpu")
def test_by_length_a_size_is_a_number_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no key is read that counts for nothing, but one of each empty place."""
    model = make("qwen2")  # one key head
    step = GraphStep(model, Recorders(monkeypatch), by_length=True)
    found = decode(model, step)
    sizes = {size for size, _ in step.seen}
    assert len({size.sequences for size in sizes}) == len(sizes) <= 15
    own = [len(s.tokens) for s in found.values()]
    needed = sum(n * (n + 1) // 2 for n in own)
    assert step.shape is not None
    if step.shape.head_tokens == 0:
        assert sum(keys_read) < 8 * needed  # under masks: each step reads the longest for all


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.usefixtures("flash_on_cpu")
def test_graphs_serve_the_next_rollout_from_the_same_cache(by_length: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other keys, and after the weights changed in place."""
    model, recorders = make("llama"), Recorders(monkeypatch)
    step = GraphStep(model, recorders, by_length=by_length)
    prompt_tokens = kv_cache.SHORT_PROMPT or 40
    shape = Shape(11, prompt_tokens, sequences=25, sequence_tokens=LIMIT + prompt_tokens, group_size=5)
    cache = DecodeCache(shape, torch.device("cpu"))
    decode(model, step, cache=cache)
    captured = len(recorders.made)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    plain = partial(step_through_transformers, model)
    same(decode(model, step, cache=cache, round=1), decode(model, plain, round=1))
    if by_length:
        assert len(recorders.made) <= captured + 4  # sizes that the first rollout saw once or never


@pytest.mark.parametrize("distribution", [Distribution(0.0), Distribution(0.7, top_k=20, top_p=0.9, min_p=0.01)])
def test_the_graph_draws_as_the_engine_does(distribution: Distribution, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorders = make("llama"), Recorders(monkeypatch)
    step = GraphStep(model, recorders)
    plain = partial(step_through_transformers, model)
    same(decode(model, step, distribution=distribution), decode(model, plain, distribution=distribution))
    drawn = {call[0].overloadpacket for recorder in recorders.made for call in recorder.calls}
    assert torch.ops.aten.argmax in drawn or torch.ops.aten.searchsorted in drawn  # within the graph


def test_a_completion_is_the_same_whatever_the_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 16 tokens are drawn between two looks at them: sequences that ended meanwhile go on, and are cut off."""
    model = make("llama")
    one = decode(model, GraphStep(model, Recorders(monkeypatch)))
    monkeypatch.setattr("grpo.backends.hf.engine.BURST", {"cpu": 16})
    many = decode(model, GraphStep(model, Recorders(monkeypatch)))
    same(many, one)


@torch.no_grad()
def test_the_check_at_start_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorders = make("llama"), Recorders(monkeypatch)
    check_decoding(model, torch.device("cpu"), GraphStep(model, recorders))
    assert [recorder.replayed for recorder in recorders.made] == [2]  # of four steps: computed, captured, twice again

    class Stale(Recorders):
        def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
            super().__call__(compute)
            return lambda: None

    with pytest.raises(UserError, match="decodes to other logits"):
        check_decoding(model, torch.device("cpu"), GraphStep(model, Stale(monkeypatch)))


def test_without_memory_for_a_graph_steps_go_on_without(caplog: pytest.LogCaptureFixture) -> None:
    def none_left(compute: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = make("llama")
    expected = decode(model, partial(step_through_transformers, model))
    same(decode(model, GraphStep(model, none_left)), expected)
    assert "no memory to capture a CUDA graph of Size(sequences=" in caplog.text


def test_sizes_are_few() -> None:
    """A rollout of any lengths needs a handful of graphs, and none computes a third more than what runs."""
    assert [Size.power(n, 40) for n in (1, 17, 33)] == [1, 32, 40]
    assert [Size.up(n, 500) for n in (1, 3, 8, 9, 16, 17, 31, 33, 257, 499)] == [1, 3, 8, 10, 16, 20, 32, 40, 320, 500]
    assert len({Size.up(n, 512) for n in range(1, 513)}) == 32
