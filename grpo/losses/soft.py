"""A soft gate in place of the clip (sapo)."""

from __future__ import annotations

import torch

from grpo.losses.tokens import LossOptions, Tokens


def sapo_objective(tokens: Tokens, options: LossOptions) -> torch.Tensor:
    """SAPO (arXiv:2511.20347), per token: -(4 / tau) sigmoid(tau (r - 1)) A; (B,T).

    tau is ``sapo_temperature_pos`` where A > 0, ``sapo_temperature_neg`` elsewhere. At r = 1 the gradient is
    REINFORCE's; away from it, on either side, it fades.
    """
    advantages_B1 = tokens.advantages_B1
    tau_B1 = torch.full_like(advantages_B1, options.sapo_temperature_neg)
    tau_B1[advantages_B1 > 0] = options.sapo_temperature_pos
    return -(tau_B1 * (tokens.ratio_BT - 1)).sigmoid() * 4 / tau_B1 * advantages_B1
