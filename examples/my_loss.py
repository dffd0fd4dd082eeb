"""A loss of your own: REINFORCE with an importance weight that is capped at 2 and not bounded below.

    grpo train smoke_cpu algorithm.loss_type=examples/my_loss.py:capped training.output_dir=runs/my_loss

or, in a recipe, ``algorithm: {loss_type: my_loss.py:capped}``. Seconds on a CPU.

The function says what each token contributes, (B,T); ``reduce`` sums that over a micro-batch, and ``denominator`` is
what the sum is divided by, counted over the whole optimizer step. ``grpo/losses/tokens.py`` has the usual ones of both,
and says what ``tokens`` holds.
"""

from grpo.losses import loss
from grpo.losses.tokens import by_tokens, token_sum

CAP = 2.0


def cut_tokens(tokens, options):
    """Metrics of your own: sums over the micro-batch, divided by its tokens and logged as ``loss/capped_ratio``."""
    return {"capped_ratio": ((tokens.ratio_BT.detach() > CAP) * tokens.mask_BT).sum()}


@loss(reduce=token_sum, denominator=by_tokens, measure=cut_tokens)
def capped(tokens, options):
    """-min(ratio, 2) A log pi; the weight has no gradient, log pi has."""
    weight_BT = tokens.ratio_BT.detach().clamp(max=CAP)
    return -weight_BT * tokens.advantages * tokens.logps_BT
