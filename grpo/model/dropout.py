"""What is random in a model's training passes: turned off, so that the policy that learns is the one that samples.

Dropout of every kind, layers left out (``layerdrop``) and noise on a router's logits make one row two different
log-probabilities in two passes. Ratios of one would be clipped, and a policy would be some KL away from itself. LoRA's
own dropout (``model.lora.lora_dropout``) is added later and stays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from grpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from grpo.model.logprob_lm import LogprobLM

TOKENS = 24
TOLERANCE = 1e-3  # of the largest hidden state
RATE, NOISE = "drop", "jitter"  # in the names that transformers gives to them


def turn_off_dropout(causal_lm: PreTrainedModel) -> None:
    """Set every rate of the model to 0: of its modules, and of its configuration, which some ask in each pass. A router
    with noise computes in training as it does in sampling instead: to some, the noise's size is a threshold too."""
    causal_lm._config_as_read = copy.deepcopy(causal_lm.config)
    for module in list(causal_lm.modules()):
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero_rates(module)
        if any(NOISE in name for name in vars(module)):
            module.training = False
            module.train = MethodType(_train_but_for_itself, module)  # type: ignore[method-assign]
    for config in _configs(causal_lm):
        _zero_rates(config)


def config_as_read(causal_lm: PreTrainedModel) -> PreTrainedConfig:
    """The configuration with the rates that were turned off, as an exported model keeps them."""
    return getattr(causal_lm, "_config_as_read", causal_lm.config)


def _train_but_for_itself(self: nn.Module, mode: bool = True) -> nn.Module:
    nn.Module.train(self, mode)
    self.training = False
    return self


def _configs(causal_lm: nn.Module) -> Iterator[Any]:
    """The configurations that the model's modules hold, each once."""
    seen: set[int] = set()
    for module in causal_lm.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config


def _zero_rates(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        is_rate = isinstance(value, float | int) and not isinstance(value, bool) and 0 < value <= 1
        if is_rate and RATE in name.lower():
            setattr(owner, name, 0.0)


@torch.no_grad()
def check_repeats(logprob_lm: LogprobLM) -> None:
    """Refuse a model whose passes in training mode are still others than those it samples by.

    Raises:
        UserError: they are.
    """
    was_training, tokens = logprob_lm.training, torch.arange(TOKENS)[None] % logprob_lm.vocab_size
    ids_BT = tokens.to(next(logprob_lm.parameters()).device)
    try:
        with torch.random.fork_rng(devices=[]):
            sampled = logprob_lm.eval().body(input_ids=ids_BT, use_cache=False).last_hidden_state
            logprob_lm.train()
            trained = logprob_lm.body(input_ids=ids_BT, use_cache=False).last_hidden_state
    finally:
        logprob_lm.train(was_training)
    off = float((trained - sampled).abs().max())
    if not off <= TOLERANCE * float(sampled.abs().max()):
        raise UserError(
            f"model.name: {type(logprob_lm.causal_lm).__name__} computes other hidden states in training mode than it "
            f"samples by (they differ by up to {off:.2g}), with all dropout off that its configuration names: the "
            "policy would differ from itself. Set to 0 in its config.json what is random, or model.disable_dropout: "
            "false to train all the same"
        )
