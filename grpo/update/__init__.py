"""The optimizer steps made from a rollout, in micro-batches that fit in memory.

Others take ``step.update`` and ``step.backward``, ``kl_in_reward.less_kl``, ``metrics.mean_over_updates``,
``experts.StepExperts``, and for passes of their own ``forward`` and ``micro_batch_size``.
"""
