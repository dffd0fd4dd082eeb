"""A KL penalty subtracted from the rewards, before advantages are computed (``algorithm.kl_in_reward``)."""

from __future__ import annotations

import numpy as np
import torch

from grpo.losses import kl_estimate
from grpo.packing import to_sequences
from grpo.run.run import Run
from grpo.types import Group
from grpo.update.forward import sequence_statistics


def less_kl(run: Run, rewards_PG: np.ndarray, groups: list[Group]) -> tuple[np.ndarray, dict[str, float]]:
    """With ``kl_in_reward``: the rewards minus beta times the completion's KL, and the mean KL per token.

    The KL is the sum of ``kl_estimate`` over the completion's tokens, under the policy before the update
    (arXiv:2402.14740, and TRL's RLOOTrainer). REINFORCE++ (arXiv:2501.03262) gives a token only the KL of the tokens
    after it: the same expected gradient, with less variance. Without ``kl_in_reward`` the rewards are unchanged.
    """
    algorithm = run.recipe.algorithm
    if not (algorithm.kl_in_reward and algorithm.beta > 0):
        return rewards_PG, {}
    sequences = to_sequences(groups, np.zeros(rewards_PG.shape), algorithm)
    places = [i for i, s in enumerate(sequences) if s.num_model_tokens and not np.isnan(rewards_PG.flat[i])]
    statistics = sequence_statistics(run, [sequences[i] for i in places], reference=True)
    kl_PG = np.zeros(rewards_PG.shape)
    for i, found in zip(places, statistics, strict=True):  # 0 under both at an environment's tokens: they add nothing
        logps_T, ref_logps_T = torch.tensor(found.logprobs), torch.tensor(found.ref_logprobs)
        kl_PG.flat[i] = float(kl_estimate(logps_T, ref_logps_T, estimator=algorithm.kl_estimator).double().sum())
    tokens = sum(sequences[i].num_model_tokens for i in places)
    return rewards_PG - algorithm.beta * kl_PG, {"kl": float(kl_PG.sum()) / max(tokens, 1)}
