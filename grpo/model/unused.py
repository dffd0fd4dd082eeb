"""Weights that text does not reach: the vision tower of a multimodal model, layers that take over another's keys.

They get no gradient. Left among the trained ones they would cost moments, be decayed, and be waited for.
"""

from __future__ import annotations

import logging
import re

import torch
from torch import nn

from grpo.model.logprob_lm import LogprobLM
from grpo.model.packed_check import in_float32

log = logging.getLogger("grpo")

TOKENS = 16


def freeze_unused(logprob_lm: LogprobLM, names: list[str] | None) -> list[str]:
    """Freeze the weights of these names, or (None) all that are found to be unused. Returns their names."""
    names = without_gradient(logprob_lm) if names is None else names
    for name in names:
        logprob_lm.get_parameter(name).requires_grad_(False)
    return names


def without_gradient(logprob_lm: LogprobLM) -> list[str]:
    """Names of trained weights on which no log-probability depends, whatever the text.

    A router may pass over an expert in the few tokens tried here. So a weight counts as reached if another of its
    layer's list is: ``layers.3.experts.5.up`` if ``layers.3.experts.2.up``.
    """
    trained = {name: p for name, p in logprob_lm.named_parameters() if p.requires_grad}
    reached = _reached(logprob_lm)
    kinds = {_kind(name) for name, p in trained.items() if id(p) in reached}
    return [name for name, p in trained.items() if id(p) not in reached and _kind(name) not in kinds]


def described(names: list[str]) -> str:
    """For the log: the outermost modules of these weights."""
    modules = sorted({".".join(name.removeprefix("causal_lm.").split(".")[:2]) for name in names})
    return ", ".join(modules[:4]) + (", ..." if len(modules) > 4 else "")


def _reached(logprob_lm: LogprobLM) -> set[int]:
    """The ids of weights in the graph of a few tokens' logits. Nothing is computed backwards."""
    device = next(logprob_lm.parameters()).device
    ids_BT = torch.linspace(0, logprob_lm.vocab_size - 1, TOKENS, device=device).long()[None]
    was_training = logprob_lm.training
    logprob_lm.train()  # as in an update: some layers go another way then
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), in_float32(logprob_lm):
            logits = logprob_lm.causal_lm(input_ids=ids_BT, use_cache=False).logits
    except Exception as error:  # of a class that is none of ours: LogprobLM.check refuses it by name
        log.debug("the weights that text reaches are not known: %s", error)
        return {id(parameter) for parameter in logprob_lm.parameters()}
    finally:
        logprob_lm.train(was_training)
    found: set[int] = set()
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(weight := getattr(node, "variable", None), nn.Parameter):
            found.add(id(weight))
        nodes += [following for following, _ in node.next_functions]
    return found


def _kind(name: str) -> str:
    """A name without its last number, if it has another before."""
    return re.sub(r"(\.\d+\..*)\.\d+\.(?!.*\.\d+\.)", r"\1.*.", name)
