"""Policy losses: pure functions of tensors, one file per family.

A loss type is three small functions: what each token contributes (``objective``), how contributions are summed over a
micro-batch (``reduce``), and what the sum is divided by (``denominator``). Denominators are counted over the *whole*
optimizer step, all micro-batches and processes, before the first backward. So the gradient does not depend on how
sequences were split; ``bnpo`` alone is defined per micro-batch. ``registry.LOSSES`` lists the loss types;
``policy_loss`` computes any of them.

Signs: everything here is a loss to be minimized. Shapes are (B,T) with a float mask that is 1 at tokens that count;
(B,1) for one number per sequence. Logarithms are natural.
"""

from grpo.losses.assembly import policy_loss
from grpo.losses.distillation import completed, distillation_loss, divergence_of, divergence_slope
from grpo.losses.entropy import EntropyControl, entropy_bonus, next_entropy_control, top_entropy_kept
from grpo.losses.kl import kl_estimate
from grpo.losses.registry import LOSSES, find_loss, loss
from grpo.losses.router import balance_loss, bias_moves, expert_loads, load_metrics
from grpo.losses.sampler import importance_metrics, importance_ratio, importance_weights, off_policy_kept
from grpo.losses.tokens import MAX_LOG_RATIO, Counts, LossType, StepTokens, Tokens

__all__ = [
    "LOSSES",
    "MAX_LOG_RATIO",
    "Counts",
    "EntropyControl",
    "LossType",
    "StepTokens",
    "Tokens",
    "balance_loss",
    "bias_moves",
    "completed",
    "distillation_loss",
    "divergence_of",
    "divergence_slope",
    "entropy_bonus",
    "expert_loads",
    "find_loss",
    "importance_metrics",
    "importance_ratio",
    "importance_weights",
    "kl_estimate",
    "load_metrics",
    "loss",
    "next_entropy_control",
    "off_policy_kept",
    "policy_loss",
    "top_entropy_kept",
]
