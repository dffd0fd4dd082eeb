"""The optimizer steps made from a rollout, in micro-batches that fit in memory.

Others take ``step.update``, ``supervised`` (a step that imitates), ``kl_in_reward.less_kl``,
``metrics.mean_over_updates``, and for passes of their own ``forward`` and ``micro_batch_size``.
"""
