"""Variants of AdamW, and the learning-rate schedule."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn

from grpo.config import OptimizerConfig
from grpo.errors import UserError
from grpo.model.bitsandbytes import import_bitsandbytes
from grpo.model.compact_adamw import CompactAdamW


def make_optimizer(model: nn.Module, config: OptimizerConfig, *, sharded: bool = False) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over the trained parameters; weight decay on matrices only.

    ``sharded`` says that FSDP2 or ZeRO will cut the parameters.

    Raises:
        UserError: ``optim`` can't step such parameters, or needs bitsandbytes, which is not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optim != "adamw_torch":
        import_bitsandbytes(f"optimizer.optim: {config.optim}")
    if config.optim == "paged_adamw_8bit":
        return _paged(groups, config, betas, sharded=sharded)
    in_bfloat16 = any(p.dtype == torch.bfloat16 for p in trained)
    if config.optim == "adamw_torch" and not (config.offload or in_bfloat16):
        # fused: one pass over memory, without temporary tensors
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)
    return CompactAdamW(
        groups,
        lr=config.learning_rate,
        betas=betas,
        eps=config.adam_epsilon,
        eight_bit=config.optim == "adamw_8bit",
        offload=config.offload,
    )


def _paged(
    groups: list[dict], config: OptimizerConfig, betas: tuple[float, float], *, sharded: bool
) -> torch.optim.Optimizer:
    if sharded:  # its state can't be sharded
        raise UserError(
            "optimizer.optim: paged_adamw_8bit can't step weights that are sharded over processes; use adamw_8bit with "
            "optimizer.offload: true, which holds its state in the host's memory too"
        )
    # On a CPU the paged optimizer works as the plain one, and warns of that at every tensor.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)


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
