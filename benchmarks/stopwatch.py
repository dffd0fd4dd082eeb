"""Hooks into model, sampler and update that time the parts of a training step, for ``profile``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import nn


class Spans:
    """Seconds by part. Spans nest, and a second counts for the innermost alone."""

    def __init__(self, seconds: Counter[str]):
        self.seconds = seconds
        self.open: list[str] = []
        self.since = 0.0
        self.wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def enter(self, part: str) -> None:
        self._count()
        self.open.append(part)

    def leave(self) -> None:
        self._count()
        self.open.pop()

    def _count(self) -> None:
        self.wait()
        now = perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Yields the seconds of each part of this process's training steps. Wraps what the trainer calls, for good."""
    from grpo import trainer
    from grpo.backends.hf import backend, draw, step_compiled
    from grpo.model.policy import Policy

    seconds: Counter[str] = Counter()
    spans = Spans(seconds)
    _wrap_everywhere(draw.sample, lambda: "sampling", spans)
    _wrap(step_compiled.DecodeStep, "__init__", lambda: "weights into panels", spans)
    _wrap(step_compiled.DecodeStep, "__call__", lambda: "decode: compiled step", spans)
    _wrap(trainer, "update", lambda: "other", spans)
    _wrap(Policy, "clip_gradients", lambda: "clip and optimizer", spans)
    _wrap(Policy, "step", lambda: "clip and optimizer", spans)
    _wrap(Policy, "logprobs", lambda: "head and loss", spans)
    _watch_backward(spans)
    made = Policy.__init__

    def policy_made(self: Policy, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        _watch_model(self.causal_lm, spans)

    made_backend = backend.HFBackend.__init__

    def backend_made(self: Any, policy: Policy, *args: Any, **kwargs: Any) -> None:
        made_backend(self, policy, *args, **kwargs)
        if self.model is not policy.causal_lm:
            _watch_model(self.model, spans)
        _wrap(self, "generate", lambda: "bookkeeping", spans)

    Policy.__init__, backend.HFBackend.__init__ = policy_made, backend_made  # type: ignore[method-assign]
    yield seconds


def _wrap(owner: Any, name: str, part: Callable[[], str], spans: Spans) -> None:
    inner = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        spans.enter(part())
        try:
            return inner(*args, **kwargs)
        finally:
            spans.leave()

    setattr(owner, name, call)


def _wrap_everywhere(function: Callable[..., Any], part: Callable[[], str], spans: Spans) -> None:
    import sys

    for name, module in list(sys.modules.items()):
        if name.startswith("grpo.backends") and getattr(module, function.__name__, None) is function:
            _wrap(module, function.__name__, part, spans)


def _watch_model(model: Any, spans: Spans) -> None:
    """Parts within the model: one in the update, one while prompts are read, and one for each kind of layer while
    tokens are decoded, one a sequence."""
    state = {"within": ""}

    def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        rollout = "bookkeeping" in spans.open  # the update computes log-probabilities without gradients too
        decoding = rollout and ids is not None and ids.shape[1] == 1
        state["within"] = "decode" if decoding else "prefill" if rollout else "forward"
        spans.enter("decode: rest of the model" if decoding else state["within"])

    def end(_: nn.Module, __: Any, output: Any) -> None:
        spans.leave()
        state["within"] = ""
        hidden = output[0]
        if hidden.requires_grad:  # its gradient comes once the head's backward pass is over
            hidden.register_hook(lambda _: _turn_to(spans, "backward: model"))

    def layer(part: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def begin_layer(*_: Any) -> None:
            if state["within"] == "decode":
                spans.enter(part)

        def end_layer(*_: Any) -> None:
            if state["within"] == "decode":
                spans.leave()

        return begin_layer, end_layer

    base = model.base_model
    base.register_forward_pre_hook(begin, with_kwargs=True)
    base.register_forward_hook(end)
    for name, module in base.named_modules():
        is_linear = isinstance(module, nn.Linear)
        if is_linear or name.endswith("attn"):
            before, after = layer("decode: linear layers" if is_linear else "decode: attention")
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    _watch_head(model.get_output_embeddings(), spans, state)


def _watch_head(head: nn.Module, spans: Spans, state: dict[str, str]) -> None:
    """The output head as a part of a rollout. In the update it does not run as a module."""

    def counts() -> bool:
        return bool(spans.open) and spans.open[-1] == "bookkeeping"

    entered: list[bool] = []

    def before(*_: Any) -> None:
        entered.append(counts())
        if entered[-1]:
            spans.enter("output head")

    def after(*_: Any) -> None:
        if entered.pop():
            spans.leave()

    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)


def _watch_backward(spans: Spans) -> None:
    inner = torch.Tensor.backward

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        spans.enter("backward: head")
        try:
            inner(self, *args, **kwargs)
        finally:
            spans.leave()

    torch.Tensor.backward = backward  # type: ignore[method-assign, assignment]


def _turn_to(spans: Spans, part: str) -> None:
    """From here on, count for ``part`` instead of the open one."""
    spans.leave()
    spans.enter(part)
