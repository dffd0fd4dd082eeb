"""The recipe's section ``health``: what each rule of ``grpo.health`` does when it begins to hold."""

from __future__ import annotations

from typing import Literal

from grpo.config.base import PositiveInt, Section

Action = Literal["off", "warn", "rollback", "stop"]


class HealthConfig(Section):
    no_signal: Action = "warn"
    """Nearly all groups are paid alike. `warn` says so on the screen and in the metrics, with cause and cure; `stop`
    also ends the run, with a checkpoint and exit code 1; `rollback` takes it back to its best model (needs
    `training.save_best`): weights and the optimizer's moments are those of the best evaluation again, while steps, data
    and draws go on; `off` does not look."""
    all_alike: Action = "warn"
    """The completions of a group are nearly all the same."""
    never_correct: Action = "warn"
    """Answers are found in the right form, and after 20 steps none was correct."""
    accuracy_below_start: Action = "warn"
    """Held-out accuracy is clearly below that before the first step (their 95% intervals do not meet)."""
    reward_without_accuracy: Action = "warn"
    """The reward rises while held-out accuracy falls clearly."""
    length_collapse: Action = "warn"
    """Completions are a quarter as long as at the start, and are paid no more."""
    entropy_collapse: Action = "warn"
    """Entropy is below 0.02 nats a token, and a fifth of what it was."""
    cut_off: Action = "warn"
    """More than half of the completions reach the longest length."""
    kl_blow_up: Action = "warn"
    """The KL divergence from the reference is above 1 nat a token."""
    clipped: Action = "warn"
    """More than 30% of the tokens are clipped."""
    sampler_mismatch: Action = "warn"
    """Sampler and trainer differ by more than 0.1 nats a token."""
    gradient: Action = "warn"
    """The gradient's norm is 20 times the usual one."""
    slow_reward: Action = "warn"
    """Steps wait for reward functions longer than for all else."""
    unscored: Action = "warn"
    """More than 5% of the completions have no reward."""
    max_rollbacks: PositiveInt = 2
    """Rollbacks of a run at most. The next rule that asks for one stops the run."""

    def rolls_back(self) -> bool:
        """Whether any rule may take the run back to its best model."""
        return "rollback" in self.model_dump().values()
