"""A reward of your own: countdown, with half a point for an expression that comes near the target.

    grpo train smoke_cpu 'rewards=[{path: examples/my_reward.py:near_target}]' training.output_dir=runs/my_reward

or, in a recipe, ``rewards: [{path: my_reward.py:near_target, args: {within: 5}}]``. Seconds on a CPU.

A reward function is called once a group. Lists have one entry a completion. Columns of the rows are passed by their
names (``nums``, ``target``), keywords of ``args`` as they are. It returns a number for each completion, or None if it
could not say. It runs in a process of its own, which may hang or crash without harm to the run.
"""

from rewards.countdown import Unparseable, evaluate, verify
from rewards.tags import NoAnswer, single_answer
from rewards.verdict import Outcome


def near_target(prompts, completions, nums, target, status, within=10, log_metric=None, **kwargs):
    rewards = [
        score(completion, nums_i, target_i, status_i, within)
        for completion, nums_i, target_i, status_i in zip(completions, nums, target, status, strict=True)
    ]
    if log_metric is not None:
        log_metric("near_share", sum(0 < reward < 1 for reward in rewards) / len(rewards))
    return rewards


def score(completion, nums, target, status, within):
    """1 if it is right. If the right numbers give something else, up to 1/2: the nearer, the more. Else 0."""
    if verify(nums, target, completion, status=status).outcome is Outcome.CORRECT:
        return 1.0
    try:
        value, used = evaluate(single_answer(completion))
    except (NoAnswer, Unparseable, ZeroDivisionError):
        return 0.0
    if sorted(used) != sorted(nums):
        return 0.0
    return 0.5 * max(0.0, 1.0 - abs(float(value) - target) / within)
