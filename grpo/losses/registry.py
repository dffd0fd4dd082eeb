"""Every loss type by its name, and how one in a user's own file is found.

An objective's docstring has the formula for one token. The table has the rest; only valid tokens and sequences count:

    name          sum over                      divided by the step's   deviates from its source in
    grpo          tokens' mean, sequences       sequences               no KL unless beta is set (0.04 in the paper)
    dr_grpo       tokens                        sequences x max length  -
    dapo          tokens                        tokens                  tokens of the optimizer step, not of a group
    bnpo          tokens' mean, micro-batches   micro-batches           -
    gspo          tokens' mean, sequences       sequences               default epsilons are not the paper's 3e-4, 4e-4
    luspo         tokens                        sequences               -
    cispo         tokens                        tokens                  the bound is epsilon_high itself, as in TRL
    sapo          tokens' mean, sequences       sequences               -
    vespo         tokens                        tokens                  log w cut to [log 1e-8, 20], as in TRL
    reinforce     tokens                        sequences               -
    rloo          completions                   sequences               a clip, as in TRL, for several updates
    reinforce_pp  tokens                        tokens                  KL summed per completion, not to-go
    clip_cov      tokens                        tokens                  selects in the step, not in a micro-batch
    kl_cov        tokens                        tokens                  the same

"tokens' mean, sequences" is the sum over sequences of their means over tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache
from typing import Any

from grpo import user_code
from grpo.errors import UserError
from grpo.losses.clipped import (
    clip_metrics,
    clipped_surrogate,
    completion_clip_metrics,
    completion_surrogate,
    sapo_objective,
)
from grpo.losses.covariance import clip_cov_selection, kl_cov_objective, kl_cov_selection
from grpo.losses.own import checked
from grpo.losses.tokens import (
    LossType,
    Objective,
    by_longest,
    by_micro_batches,
    by_sequences,
    by_tokens,
    micro_batch_mean,
    sequence_means,
    token_sum,
)
from grpo.losses.weighted import (
    cispo_metrics,
    cispo_objective,
    reinforce_objective,
    vespo_metrics,
    vespo_objective,
)

LOSSES: dict[str, LossType] = {
    "grpo": LossType(clipped_surrogate, sequence_means, by_sequences, "arXiv:2402.03300, eq. 3", measure=clip_metrics),
    "dr_grpo": LossType(clipped_surrogate, token_sum, by_longest, "arXiv:2503.20783, listing 1", measure=clip_metrics),
    "dapo": LossType(clipped_surrogate, token_sum, by_tokens, "arXiv:2503.14476, eq. 8", measure=clip_metrics),
    "bnpo": LossType(
        clipped_surrogate, micro_batch_mean, by_micro_batches, "TRL's loss_type bnpo", measure=clip_metrics
    ),
    "gspo": LossType(
        clipped_surrogate,
        sequence_means,
        by_sequences,
        "arXiv:2507.18071, eq. 5",
        level="sequence",
        measure=clip_metrics,
    ),
    "luspo": LossType(
        clipped_surrogate, token_sum, by_sequences, "arXiv:2602.05261", level="sequence", measure=clip_metrics
    ),
    "cispo": LossType(cispo_objective, token_sum, by_tokens, "arXiv:2506.13585, eq. 4", measure=cispo_metrics),
    "sapo": LossType(sapo_objective, sequence_means, by_sequences, "arXiv:2511.20347"),
    "vespo": LossType(
        vespo_objective, token_sum, by_tokens, "arXiv:2602.10693", measure=vespo_metrics, weighs_sampler=True
    ),
    "reinforce": LossType(reinforce_objective, token_sum, by_sequences, "Williams 1992"),
    "rloo": LossType(
        completion_surrogate,
        sequence_means,
        by_sequences,
        "arXiv:2402.14740; the clip TRL's RLOOTrainer's",
        measure=completion_clip_metrics,
    ),
    "reinforce_pp": LossType(clipped_surrogate, token_sum, by_tokens, "arXiv:2501.03262", measure=clip_metrics),
    "clip_cov": LossType(
        clipped_surrogate,
        token_sum,
        by_tokens,
        "arXiv:2505.22617",
        measure=clip_metrics,
        select=clip_cov_selection,
    ),
    "kl_cov": LossType(
        kl_cov_objective,
        token_sum,
        by_tokens,
        "arXiv:2505.22617",
        select=kl_cov_selection,
        applies_kept=True,
        without_advantage=True,
    ),
}


def loss(**parts: Any) -> Callable[[Objective], LossType]:
    """Decorator that turns an objective into a loss type, for a user's own file (``loss_type: file.py:name``)::

        from grpo.losses import loss
        from grpo.losses.tokens import by_tokens, token_sum

        @loss(reduce=token_sum, denominator=by_tokens)
        def my_loss(tokens, options):
            return -tokens.ratio_BT.clamp(max=2.0) * tokens.advantages

    ``parts`` are ``LossType``'s other fields. The objective takes ``Tokens`` and the recipe's ``algorithm`` section and
    returns (B,T).
    """
    return lambda objective: LossType(objective, **({"source": "the user's own"} | parts))


@cache
def find_loss(name: str) -> LossType:
    """The loss type with that name, or at that place: ``file.py:name`` or ``package.module:name``.

    Raises:
        UserError: there is none; the message has the nearest name.
    """
    if name in LOSSES:
        return LOSSES[name]
    if not user_code.is_place(name):
        near = difflib.get_close_matches(name, LOSSES, n=1)
        raise UserError(
            f"algorithm.loss_type: there is no loss {name!r}"
            + (f"; did you mean {near[0]}?" if near else f" (there are: {', '.join(LOSSES)})")
        )
    return checked(user_code.load(name, "algorithm.loss_type"), name)
