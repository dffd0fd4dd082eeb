"""The parts of a loss: the tokens it sees, what it is divided by, and its entry in the registry.

An objective's ``options`` are the recipe's ``algorithm`` section, which has the hyperparameters of its formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from grpo.config import AlgorithmConfig
from grpo.errors import UserError

MAX_LOG_RATIO = 20.0  # exp(20) is far outside every clip range and far inside float32


@dataclass(frozen=True)
class Counts:
    """Sizes of an optimizer step, over all micro-batches and processes.

    Groups without signal are counted. Padding is not, nor are completions that could not be scored, or were truncated
    where the recipe masks those. ``kept`` is the number of tokens that a selection leaves (None: all), by which the
    entropy bonus is divided.
    """

    tokens: int
    sequences: int
    micro_batches: int
    max_completion_length: int
    kept: int | None = None


@dataclass(frozen=True)
class Tokens:
    """A micro-batch as an objective sees it; finite everywhere, also where the mask is 0.

    ``log_ratio_BT`` is log pi - log pi_old of each token. ``ratio_BT`` is its exponential at the recipe's
    ``importance_sampling_level``, with gradient. On-policy, old and current are the same numbers: the ratio is 1 and
    its gradient is that of the log-probability. ``sampler_weights``, (B,T) or (B,1), correct for the sampler's
    mismatch; ``policy_loss`` applies them unless the loss type has ``weighs_sampler``. ``kept_BT`` is 0 at tokens that
    a selection excludes, and None without a selection. ``advantages`` is (B,1), or (B,T) with ``algorithm.credit:
    turn``: it broadcasts. A loss that needs one advantage a completion reads ``advantages_B1``.
    """

    logps_BT: torch.Tensor
    log_ratio_BT: torch.Tensor
    ratio_BT: torch.Tensor
    advantages: torch.Tensor
    mask_BT: torch.Tensor
    sampler_weights: torch.Tensor | None = None
    kept_BT: torch.Tensor | None = None

    @property
    def advantages_B1(self) -> torch.Tensor:
        """One advantage a completion. Raises UserError where turns have their own."""
        if self.advantages.shape[1] != 1:
            raise UserError(
                "algorithm.credit: turn gives the turns of an episode advantages of their own, and this loss asks for "
                "one a completion (tokens.advantages_B1): let it read tokens.advantages, which is (B,T) then, or set "
                "credit: episode"
            )
        return self.advantages


class StepTokens(NamedTuple):
    """All M valid tokens of an optimizer step, without gradient: what selections choose from."""

    logps_M: torch.Tensor
    log_ratio_M: torch.Tensor
    entropies_M: torch.Tensor
    advantages_M: torch.Tensor


Objective = Callable[[Tokens, AlgorithmConfig], torch.Tensor]
Selection = Callable[[StepTokens, AlgorithmConfig, torch.Generator], torch.Tensor]
Measure = Callable[[Tokens, AlgorithmConfig], dict[str, torch.Tensor]]


def nothing_measured(tokens: Tokens, options: AlgorithmConfig) -> dict[str, torch.Tensor]:
    """No metrics of its own."""
    return {}


@dataclass(frozen=True)
class LossType:
    """One entry of the registry: the three functions that ``grpo.losses`` describes, and their source.

    ``level`` is the importance ratio's level where the recipe names none. ``measure`` gives sums over the micro-batch
    for the metrics. ``select`` chooses tokens of the whole step beforehand (1 kept, 0 selected), which costs a forward
    pass. ``weighs_sampler``: the objective applies ``sampler_weights`` itself. ``applies_kept``: the objective
    multiplies by ``kept_BT`` itself. ``without_advantage``: sequences of advantage 0 have a gradient too, so they are
    not left out.
    """

    objective: Objective
    reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    denominator: Callable[[Counts], float]
    source: str
    level: str = "token"
    measure: Measure = nothing_measured
    select: Selection | None = None
    weighs_sampler: bool = False
    applies_kept: bool = False
    without_advantage: bool = False


def sequence_means(loss_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Sum over sequences of their mean over tokens: every sequence weighs the same, so long ones weigh less a token."""
    return ((loss_BT * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1.0)).sum()


def token_sum(loss_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Sum over tokens: every token weighs the same."""
    return (loss_BT * mask_BT).sum()


def micro_batch_mean(loss_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean over this micro-batch's tokens."""
    return (loss_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1.0)


def by_tokens(counts: Counts) -> float:
    """Valid tokens of the step."""
    return counts.tokens


def by_sequences(counts: Counts) -> float:
    """Valid sequences of the step."""
    return counts.sequences


def by_longest(counts: Counts) -> float:
    """Valid sequences of the step times ``max_completion_length``: a constant, whatever lengths were sampled."""
    return counts.sequences * counts.max_completion_length


def by_micro_batches(counts: Counts) -> float:
    """Micro-batches of the step that are not padding."""
    return counts.micro_batches
