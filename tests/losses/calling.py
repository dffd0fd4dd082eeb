"""``policy_loss`` called with bare tensors and keys of the recipe's ``algorithm`` section."""

from __future__ import annotations

from typing import Any

import torch

import grpo.losses
from grpo.config import AlgorithmConfig
from grpo.losses import Counts
from grpo.types import Batch


def policy_loss(
    logps_BT: torch.Tensor,
    old_logps_BT: torch.Tensor | None,
    ref_logps_BT: torch.Tensor | None,
    advantages_B: torch.Tensor,
    mask_BT: torch.Tensor,
    counts: Counts,
    *,
    weights_BT: torch.Tensor | None = None,
    kept_BT: torch.Tensor | None = None,
    sampler_logps_BT: torch.Tensor | None = None,
    **algorithm: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    nothing = torch.empty(0)  # what the model reads is not the loss's business
    batch = Batch(
        input_ids_RN=nothing,
        layout=None,
        completion_ids_BT=nothing,
        predicts_BT=nothing,
        completion_mask_BT=nothing,
        places_M=nothing,
        mask_BT=mask_BT,
        advantages=advantages_B[:, None],
        sampler_logps_BT=nothing if sampler_logps_BT is None else sampler_logps_BT,
        old_logps_BT=old_logps_BT,
        ref_logps_BT=ref_logps_BT,
        kept_BT=kept_BT,
    )
    # Unchecked: a loss is tried with numbers that no recipe would have.
    options = AlgorithmConfig.model_construct(**algorithm)
    return grpo.losses.policy_loss(logps_BT, batch, counts, options, weights_BT)
