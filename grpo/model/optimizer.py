"""Variants of AdamW, and the learning-rate schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from grpo.config import OptimizerConfig
from grpo.errors import UserError


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, *, several_processes: bool = False
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over the trained parameters; weight decay on matrices only.

    Raises:
        UserError: ``optim`` is for one process only, or needs bitsandbytes, which is not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return _adamw(config.optim, several_processes)(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def _adamw(name: str, several_processes: bool) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw_torch":
        return partial(torch.optim.AdamW, fused=True)  # one pass over memory, without temporary tensors
    if several_processes:  # its state is not sharded, while FSDP's weights are
        raise UserError(f"optimizer.optim: {name} is for one process; with several, shard the state with FSDP2 instead")
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            f"optimizer.optim: {name} needs bitsandbytes, which is not installed: pip install 'grpo-train[8bit]'"
        ) from None
    # On a CPU the paged optimizer works as the plain one, and warns of that at every tensor.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    return {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}[name]


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The rate of step ``step`` (counted from 0): a function of the step alone, so nothing has to be saved."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    done = min(done, 1.0)
    share = 1 - done if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (config.lr_min_ratio + (1 - config.lr_min_ratio) * share)
