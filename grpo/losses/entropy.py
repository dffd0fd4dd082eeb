"""Entropy: a bonus, an adaptive coefficient for it, and the selection of high-entropy tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from grpo.losses.tokens import Counts


def entropy_bonus(
    entropy_BT: torch.Tensor, mask_BT: torch.Tensor, kept_BT: torch.Tensor | None, counts: Counts
) -> torch.Tensor:
    """This micro-batch's share of the step's mean entropy, over all valid tokens (or those ``kept``), in nats.

    The loss is policy_loss - coefficient * bonus, whatever the loss type divides by. (TRL averages over a micro-batch,
    then over micro-batches; this mean is over the step.)
    """
    acting_BT = mask_BT if kept_BT is None else mask_BT * kept_BT
    return (entropy_BT * acting_BT).sum() / max(counts.tokens if counts.kept is None else counts.kept, 1)


@dataclass(frozen=True)
class EntropyControl:
    """The adaptive coefficient and the entropy that the last update measured; a checkpoint holds both."""

    coef: float
    entropy: float = math.inf

    def applied(self, target: float) -> float:
        """The coefficient, while the entropy is at or below its target; else 0."""
        return self.coef if self.entropy <= target else 0.0


def next_entropy_control(
    control: EntropyControl, entropy: float, *, target: float, delta: float, low: float, high: float
) -> EntropyControl:
    """The control after an update with mean entropy ``entropy`` (Skywork-OR1, arXiv:2505.22312).

    The coefficient rises by ``delta`` if the entropy is at or below ``target``, else it falls by ``delta``. It stays
    within [``low``, ``high``].
    """
    moved = control.coef + delta if entropy <= target else control.coef - delta
    return EntropyControl(min(max(moved, low), high), entropy)


def top_entropy_kept(entropies_M: torch.Tensor, quantile: float) -> torch.Tensor:
    """1 at the ``quantile`` of tokens with the highest entropy, 0 elsewhere (arXiv:2506.01939; 0.2 there).

    The tokens are all valid ones of the step, so that micro-batches do not matter (TRL's are a micro-batch's).
    """
    threshold = np.quantile(entropies_M.double().numpy(), 1 - quantile)
    return (entropies_M.double() >= threshold).to(entropies_M.dtype)
