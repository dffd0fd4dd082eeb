"""The recipe's `algorithm` section: advantages and the policy loss; docs/algorithms.md."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from grpo.config_base import BelowOne, Fraction, NonNegative, Positive, PositiveInt, Section, refuse


class AlgorithmConfig(Section):
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    """How token losses are summed and what they are divided by; see docs/algorithms.md."""
    beta: NonNegative = 0.0
    """Weight of the KL penalty to the reference model; 0 loads no reference model."""
    epsilon: Positive = 0.2
    """Clip range below: ratios under 1 - epsilon give no gradient where the advantage is negative."""
    epsilon_high: Positive | None = None
    """Clip range above; null takes epsilon. DAPO's clip-higher is 0.28."""
    delta: Positive | None = None
    """Dual clip: upper bound of the ratio where the advantage is negative (above 1 + epsilon); null is off."""
    num_iterations: PositiveInt = 1
    """Passes over each rollout (mu in the GRPO paper)."""
    num_minibatches: PositiveInt = 1
    """Optimizer steps into which each pass over a rollout is split; divides prompts_per_step."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the step, or not at all (Dr. GRPO)."""
    baseline: Literal["group", "leave_one_out", "batch", "none"] = "group"
    """Subtract the group's mean reward, the mean of the others (RLOO), the step's mean (REINFORCE++) or nothing."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """With several rewards: advantages of their weighted sum, or the weighted sum of each one's advantages, normalized
    once more over the step (GDPO)."""
    pass_at_k: PositiveInt | None = None
    """Advantages for the best of k completions (Pass@k Training), k below num_generations; null: for each by itself."""
    mask_truncated_completions: bool = False
    """Leave completions that ran into max_completion_length out of the loss."""
    sync_ref_model: bool = False
    """Move the reference model toward the policy every ref_model_sync_steps steps."""
    ref_model_sync_steps: PositiveInt = 512
    """Steps between two moves of the reference model."""
    ref_model_mixup_alpha: Fraction = 0.6
    """ref = alpha * policy + (1 - alpha) * ref at each move (TR-DPO); 1.0 replaces it."""
    importance_sampling_mode: (
        Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    """Weigh the loss by the trainer's probability over the sampler's, of a token or of the whole completion, truncated
    or masked; null takes `none` with `rollout.backend: hf`, `token_truncate` with `vllm`."""
    importance_sampling_clip_max: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0
    """Largest ratio: a larger one counts as this one (truncate), or its tokens give no gradient (mask)."""
    importance_sampling_clip_min: BelowOne | None = None
    """Smallest ratio, likewise; null is off."""

    @model_validator(mode="after")
    def _bounds(self) -> AlgorithmConfig:
        problems = []
        if self.delta is not None and self.delta <= 1 + self.epsilon:
            problems.append(f"delta ({self.delta}) must be above 1 + epsilon ({1 + self.epsilon})")
        if self.sync_ref_model and self.beta == 0:
            problems.append("sync_ref_model needs a reference model: set beta above 0")
        refuse(problems + self._advantage_problems())
        return self

    def _advantage_problems(self) -> list[str]:
        problems = []
        if (self.baseline, self.scale_rewards) in (("batch", "group"), ("none", "group"), ("none", "batch")):
            cure = "batch or none" if self.baseline == "batch" else "none"
            problems.append(
                f"baseline ({self.baseline}) cannot be used with scale_rewards: {self.scale_rewards}, which would "
                f"divide equal rewards by 0; set scale_rewards to {cure}"
            )
        if self.multi_objective_aggregation == "normalize_then_sum":
            problems += [
                f"{key} cannot be used with multi_objective_aggregation: normalize_then_sum, which normalizes in its "
                "own way (by group, then by step); leave it out"
                for key, default in (("scale_rewards", "group"), ("baseline", "group"), ("pass_at_k", None))
                if getattr(self, key) != default
            ]
        elif self.pass_at_k is not None:
            if self.baseline in ("batch", "none"):
                problems.append(f"pass_at_k needs a baseline of the group: group or leave_one_out, not {self.baseline}")
            if self.scale_rewards == "batch":
                problems.append(
                    "pass_at_k needs scale_rewards: group or none; its deviation is that of a group's subsets"
                )
        return problems
