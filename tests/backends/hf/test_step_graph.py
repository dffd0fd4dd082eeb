"""Decoding steps at fixed sizes and addresses: a recorder of torch's calls stands in for a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.backends.base import Request, Sampling
from grpo.backends.hf.check import check_decoding
from grpo.backends.hf.engine import Engine, NextLogits, SampledSequence, step_through_transformers
from grpo.backends.hf.step_graph import GraphStep, Size
from grpo.errors import RunError
from grpo.model.logprob_lm import LogprobLM
from grpo.randomness import key
from grpo.types import Prompt

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


class Recorder(TorchDispatchMode):
    """As a CUDA graph: numbers and shapes are those of the capture, a replay reads and writes the same tensors, and
    a capture that waits for a tensor's value fails. Unlike one it computes while it captures; the first replay is
    that."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple, dict, Any]] = []
        self.replayed = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replayed += 1
        for func, args, kwargs, out in self.calls if self.replayed else []:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorders:
    """A ``Capture`` that keeps what it made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.made: list[Recorder] = []
        self.monkeypatch = monkeypatch

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        self.made.append(Recorder())
        with self.monkeypatch.context() as patch, self.made[-1]:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers asks
            compute()
        return self.made[-1].replay


def make(kind: str) -> LogprobLM:
    torch.manual_seed(0)
    return LogprobLM(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind])).eval())


def ends(key: int, ids: list[int]) -> bool:
    return ids[-1] % 29 == 1  # now and then, so that places become free and the queue moves up


@torch.no_grad()
def decode(
    model: LogprobLM, step: NextLogits, *, sequences: int = 512, tokens: int = 10**6
) -> dict[tuple[int, int], SampledSequence]:
    """Completions by (request, sample) of prompts of unequal lengths."""
    ids = [[5 + (7 * i + j) % 40 for j in range(3 + 3 * i)] for i in range(5)]
    wanted = [Request(Prompt(i, "", "", t), [key(0, i, g) for g in range(5)]) for i, t in enumerate(ids)]
    engine = Engine(
        model,
        wanted,
        Sampling(LIMIT),
        ends,
        max_sequences=sequences,
        cache_tokens=tokens,
        device=torch.device("cpu"),
        step=step,
    )
    return {(sequence.request, sequence.sample): sequence for sequence in engine.run()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "room", [{}, {"sequences": 7}, {"sequences": 9, "tokens": 600}], ids=["all", "queue", "preemption"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_are_those_of_steps_through_transformers(
    kind: str, room: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recorders = make(kind), Recorders(monkeypatch)
    expected = decode(model, partial(step_through_transformers, model), **room)
    found = decode(model, GraphStep(model, recorders), **room)
    assert {at: sequence.tokens for at, sequence in found.items()} == {
        at: sequence.tokens for at, sequence in expected.items()
    }
    for at, sequence in found.items():
        expected_T = torch.tensor(expected[at].logprobs)
        torch.testing.assert_close(torch.tensor(sequence.logprobs), expected_T, atol=1e-5, rtol=0)
    replays = sum(recorder.replayed for recorder in recorders.made)
    assert replays > 3 * len(recorders.made) > 0  # most steps are replays


def test_a_completion_is_the_same_whatever_the_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 16 tokens are drawn between two looks at them: sequences that ended meanwhile go on, and are cut off."""
    model = make("llama")
    one = decode(model, GraphStep(model, Recorders(monkeypatch)))
    monkeypatch.setattr("grpo.backends.hf.engine.BURST", {"cpu": 16})
    many = decode(model, GraphStep(model, Recorders(monkeypatch)))
    assert {at: sequence.tokens for at, sequence in many.items()} == {
        at: sequence.tokens for at, sequence in one.items()
    }


@torch.no_grad()
def test_the_check_at_start_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorders = make("llama"), Recorders(monkeypatch)
    check_decoding(model, torch.device("cpu"), GraphStep(model, recorders))
    assert [recorder.replayed for recorder in recorders.made] == [2]  # of four steps: computed, captured, twice again

    class Stale(Recorders):
        def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
            super().__call__(compute)
            return lambda: None

    with pytest.raises(RunError, match="decodes to other logits"):
        check_decoding(model, torch.device("cpu"), GraphStep(model, Stale(monkeypatch)))


def test_without_memory_for_a_graph_steps_go_on_without(caplog: pytest.LogCaptureFixture) -> None:
    def none_left(compute: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = make("llama")
    expected = decode(model, partial(step_through_transformers, model))
    found = decode(model, GraphStep(model, none_left))
    assert {at: sequence.tokens for at, sequence in found.items()} == {
        at: sequence.tokens for at, sequence in expected.items()
    }
    assert "no memory to capture a CUDA graph of Size(sequences=" in caplog.text


def test_sizes_are_few() -> None:
    """Powers of two up to what the buffers hold: a rollout of any lengths needs a handful of graphs."""
    assert Size.up(1, 40) == 1
    assert Size.up(33, 40) == 40
    assert Size.up(17, 40) == 32
