"""Can this model compute packed rows? This is tried once, at the start, by comparing with padded rows.

On a made-up micro-batch, packed and padded rows must give the same log-probabilities. Two deliberate mistakes
(positions that do not restart, the other prompt) must change them by far more than packed and padded rows differ. And
what other completions and prompts of the row say must not change them at all: a recurrent state that is not reset
between them would carry it on, if only a little. A model that ignores ``position_ids``, whose layers do not get the
layout, or that keeps such a state, fails one of the three.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo.errors import first_line
from grpo.kernels import CannotPack
from grpo.model.borders import past_borders
from grpo.model.logprob_lm import LogprobLM
from grpo.model.lora import wraps_parameter
from grpo.packing import collate
from grpo.types import Batch, Layout, TrainedSequence

MIN_EFFECT_OF_A_MISTAKE = 8  # times the difference of packed and padded rows; less would prove nothing
TOLERANCE = 1e-3  # nats, at a token
LEAK = 0.1  # of the tolerance: nothing but the rounding of experts, whose batches differ, may move


def why_padded(logprob_lm: LogprobLM, device: torch.device, compute_dtype: torch.dtype, longest: int = 0) -> str | None:
    """None if the model can compute packed rows on ``device``, else why it can't.

    ``kernels.install`` has given it the attention for them. The model is still whole and on the CPU, whatever it will
    be trained on; another device's kernels are compared separately. It computes in float32 (``in_float32``), so that
    rounding hides no mistake. ``longest``: of the recipe's rows, in tokens.
    """
    config = logprob_lm.config.get_text_config(decoder=True)
    if others := {kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"}:
        return f"it has layers of {sorted(others)[0].replace('_', ' ')}"
    was_training = logprob_lm.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), in_float32(logprob_lm), all_cores(device):
            _check_model(logprob_lm)
            _check_beyond(logprob_lm, past_borders(logprob_lm.config, longest))
        if device.type != "cpu":
            _check_kernels(device, compute_dtype, logprob_lm.config)
    except CannotPack as reason:
        return str(reason)
    except Exception as error:  # a user's own model may raise anything at keyword arguments that it does not know
        return f"it failed on one ({type(error).__name__}: {first_line(error)})"
    finally:
        logprob_lm.train(was_training)
    return None


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within it, a module's weights are float32 while it runs, and afterwards what they were. So weights in another
    type compute without rounding, and never is more than one module's share of them held in float32."""
    stored: dict[nn.Parameter, torch.Tensor] = {}

    def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
        # An adapter on a parameter takes it from its module, beneath, while it runs.
        return module.parameters(recurse=wraps_parameter(module))

    def widen(module: nn.Module, _: Any) -> None:
        for parameter in parameters(module):
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                stored[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter in parameters(module):
            if parameter in stored:
                parameter.data = stored.pop(parameter)

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(widen))
        hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def all_cores(device: torch.device) -> Iterator[None]:
    """Where the CPU works for an accelerator, all of its cores do: a launcher leaves each process one thread."""
    threads = torch.get_num_threads()
    if device.type != "cpu" and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_model(logprob_lm: LogprobLM) -> None:
    sequences, swapped = made_up(logprob_lm.vocab_size)
    right = collate(sequences, pad_token_id=0)
    logprob_lm.train()(right, 1.0)  # attention gets its dropout in training mode only
    logprob_lm.eval()
    packed_BT = logprob_lm(right, 1.0)[0]
    padded_BT = logprob_lm(collate(sequences, pad_token_id=0, packed=False), 1.0)[0]
    error = float((packed_BT - padded_BT).abs().max())
    if not error <= TOLERANCE:
        raise CannotPack(f"its log-probabilities differ by up to {error:.2g} in one")
    mistakes = {
        "positions that do not restart": logprob_lm(_without_restarts(right), 1.0)[0],
        "another prompt": logprob_lm(collate(swapped, pad_token_id=0), 1.0)[0],
    }
    for mistake, wrong_BT in mistakes.items():
        moved = float((wrong_BT - packed_BT).abs().max())
        if not moved > MIN_EFFECT_OF_A_MISTAKE * error:
            raise CannotPack(f"{mistake} would move its log-probabilities by {moved:.2g} only, against {error:.2g}")

    for what, others, same in unrelated(sequences):
        leaked = float((logprob_lm(collate(others, pad_token_id=0), 1.0)[0] - packed_BT)[same].abs().max())
        if not leaked <= LEAK * TOLERANCE:
            raise CannotPack(f"{what} moves its log-probabilities by {leaked:.2g}: a state passes from row to row")


def _check_beyond(logprob_lm: LogprobLM, tokens: int) -> None:
    """Compare a row of so many tokens, which passes the model's windows and rope borders, beside a short one."""
    prompt = made_up(logprob_lm.vocab_size)[0][0].prompt_ids
    if tokens <= len(prompt):
        return
    completion = [(3 + 7919 * i * i) % logprob_lm.vocab_size for i in range(tokens - len(prompt))]
    rows = [TrainedSequence(prompt, ids, [0.0] * len(ids), 1.0) for ids in (completion, completion[:9])]
    ways = [logprob_lm(collate(rows, pad_token_id=0, packed=packed), 1.0)[0] for packed in (True, False)]
    error = float((ways[0] - ways[1]).abs().max())
    if not error <= TOLERANCE:
        raise CannotPack(f"its log-probabilities differ by up to {error:.2g} in one of {tokens} tokens")


def unrelated(sequences: list[TrainedSequence]) -> Iterator[tuple[str, list[TrainedSequence], list[int]]]:
    """The sequences of ``made_up`` with other tokens in some; and those whose log-probabilities that must not move.
    All lengths stay, so that everything is computed in the same shapes."""

    def other(tokens: list[int]) -> list[int]:
        return [min(tokens) + max(tokens) - token for token in tokens]

    first = [replace(s, completion_ids=other(s.completion_ids)) if i in (0, 1) else s for i, s in enumerate(sequences)]
    yield "what the completion before a completion says", first, [2, 3, 4]
    prompt = sequences[0].prompt_ids
    changed = [
        replace(s, prompt_ids=other(prompt), completion_ids=other(s.completion_ids)) if s.prompt_ids == prompt else s
        for s in sequences
    ]
    yield "what another prompt says", changed, [1, 4]


def made_up(vocab_size: int) -> tuple[list[TrainedSequence], list[TrainedSequence]]:
    """Five completions of two prompts, of different lengths; and the same with the prompts exchanged."""

    def tokens(length: int, seed: int) -> list[int]:
        return [(seed + 7919 * i * i) % vocab_size for i in range(1, length + 1)]

    prompts = tokens(23, 5), tokens(40, 11)
    completions = [(0, 12), (1, 9), (0, 1), (0, 30), (1, 17)]
    pairs = [(prompts[p], prompts[1 - p], tokens(length, 100 + i)) for i, (p, length) in enumerate(completions)]
    right = [TrainedSequence(prompt, completion, [0.0] * len(completion), 1.0) for prompt, _, completion in pairs]
    return right, [replace(s, prompt_ids=other) for s, (_, other, _) in zip(right, pairs, strict=True)]


def _without_restarts(batch: Batch) -> Batch:
    assert batch.layout is not None
    positions_1N = torch.arange(batch.input_ids_RN.shape[1])[None]
    return replace(batch, layout=replace(batch.layout, position_ids_1N=positions_1N))


def _check_kernels(device: torch.device, dtype: torch.dtype, whole_config: Any) -> None:
    """Compare the device's kernels with the CPU's in float32, forward and backward, on random numbers of the model's
    shape."""
    attention = ALL_ATTENTION_FUNCTIONS[whole_config._attn_implementation]
    config = whole_config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    D = getattr(config, "head_dim", None) or config.hidden_size // heads
    layout = collate(made_up(100)[0], pad_token_id=0, device=device).layout
    N = layout.segments[-1]
    random = torch.Generator().manual_seed(0)
    qkv = [torch.randn((1, h, N, D), generator=random).to(dtype) for h in (heads, kv_heads, kv_heads)]
    grad = torch.randn((1, N, heads, D), generator=random)
    there = _with_gradients(attention, [x.to(device) for x in qkv], grad.to(device, dtype), layout)
    here = _with_gradients(attention, [x.float() for x in qkv], grad, layout)
    for ours, expected in zip(there, here, strict=True):
        error = float((ours.float().cpu() - expected).norm() / expected.norm())
        if not error < 0.02:  # bfloat16 rounds to 0.004
            raise CannotPack(f"its attention on {device.type} is off by {error:.2g} of its size")


def _with_gradients(
    attention: Callable, qkv: list[torch.Tensor], grad: torch.Tensor, layout: Layout
) -> list[torch.Tensor]:
    inputs = [x.requires_grad_() for x in qkv]
    with torch.enable_grad():
        out, _ = attention(nn.Identity(), *inputs, None, layout=layout)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]
