"""The recipe's `algorithm` section: advantages and the policy loss; docs/algorithms.md."""

from __future__ import annotations

import difflib
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from grpo.config.base import BelowOne, Fraction, NonNegative, Positive, PositiveInt, Problem, Section, refuse

# ``grpo.losses.LOSSES`` has the same names; a recipe is read without torch, which that needs.
LOSS_TYPES = (
    "grpo",
    "dr_grpo",
    "dapo",
    "bnpo",
    "gspo",
    "luspo",
    "cispo",
    "sapo",
    "vespo",
    "reinforce",
    "rloo",
    "reinforce_pp",
    "clip_cov",
    "kl_cov",
)
# What a loss type's name means besides the loss; such a key is filled in, and refused where it says something else.
PRESETS: dict[str, dict[str, Any]] = {
    "rloo": {"baseline": "leave_one_out", "scale_rewards": "none", "kl_estimator": "k1", "kl_in_reward": True},
    "reinforce_pp": {"baseline": "batch", "scale_rewards": "batch", "kl_estimator": "k1", "kl_in_reward": True},
}


def _known_loss(name: str) -> str:
    """A built-in loss, or the place of one: file.py:name or package.module:name."""
    if name in LOSS_TYPES or (":" in name and all(part.strip() for part in name.rpartition(":"))):
        return os.path.expanduser(name)
    near = difflib.get_close_matches(name, LOSS_TYPES, n=1)
    raise ValueError(
        f"must be {', '.join(LOSS_TYPES)} or a loss of yours as file.py:name, got {name!r}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


class AlgorithmConfig(Section):
    loss_type: Annotated[str, AfterValidator(_known_loss), WithJsonSchema({"enum": [*LOSS_TYPES, "file.py:name"]})] = (
        "dapo"
    )
    """What a token contributes, how that is summed and what it is divided by, see docs/algorithms.md; or a decorated
    function of yours. `rloo` and `reinforce_pp` are a loss with its advantages."""
    beta: NonNegative = 0.0
    """Weight of the KL penalty to the reference model; 0 loads no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How KL is estimated from a sampled token; in the loss `k1` has no gradient (unless bias-corrected)."""
    kl_in_reward: bool = False
    """Take beta times the completion's KL off its reward, before the advantage, instead of adding it to the loss."""
    use_bias_correction_kl: bool = False
    """Multiply the KL estimate in the loss by the ratio, with its gradient, which makes it the reverse KL's. On in
    TRL."""
    epsilon: Positive = 0.2
    """Clip range below: ratios under 1 - epsilon give no gradient where the advantage is negative."""
    epsilon_high: Positive | None = None
    """Clip range above; null takes epsilon. DAPO's clip-higher is 0.28. With `cispo` the bound of the weight itself;
    null is 5."""
    delta: Positive | None = None
    """Dual clip: upper bound of the ratio where the advantage is negative (above 1 + epsilon); null is off."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] | None = None
    """The ratio to the old policy: of each token, the geometric mean of a sequence's (GSPO), or that in value with each
    token's own gradient; null takes `token`, and `sequence` with `gspo` and `luspo`."""
    off_policy_mask_threshold: Positive | None = None
    """Leave out sequences of negative advantage whose tokens were on average this much likelier (nats) to the sampler
    than to the policy; null is off."""
    top_entropy_quantile: Fraction = 1.0
    """Learn from this share of the step's tokens, those of highest entropy (0.2 in the paper). Below 1 it costs a
    forward pass."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus: the loss is less by this much times the mean entropy of a token, in nats."""
    use_adaptive_entropy: bool = False
    """Move the coefficient, from entropy_coef on, at each update: up while entropy is at most entropy_target, else
    down; it acts only while entropy is at most the target."""
    entropy_target: NonNegative = 0.2
    """Mean entropy of a token, in nats, that the adaptive coefficient keeps up."""
    entropy_coef_delta: Positive = 0.005
    """Step of the adaptive coefficient."""
    entropy_coef_min: NonNegative = 0.0
    """Its lower bound."""
    entropy_coef_max: NonNegative = 1.0
    """Its upper bound."""
    sapo_temperature_pos: Positive = 1.0
    """`sapo`: steepness of the gate where the advantage is positive."""
    sapo_temperature_neg: Positive = 1.05
    """`sapo`: the same where it is not."""
    vespo_k_pos: NonNegative = 2.0
    """`vespo`: power of the completion's ratio in its weight, where the advantage is not negative."""
    vespo_lambda_pos: Positive = 3.0
    """`vespo`: decay of the weight with the ratio, likewise."""
    vespo_k_neg: NonNegative = 3.0
    """`vespo`: the power where the advantage is negative."""
    vespo_lambda_neg: Positive = 2.0
    """`vespo`: the decay where it is negative."""
    clip_cov_ratio: Fraction = 0.0002
    """`clip_cov`: share of the step's tokens whose gradient is taken."""
    clip_cov_lb: NonNegative = 1.0
    """`clip_cov`: smallest covariance of log-probability and advantage of such a token."""
    clip_cov_ub: Positive = 5.0
    """`clip_cov`: largest, likewise."""
    kl_cov_ratio: Fraction = 0.0002
    """`kl_cov`: share of the step's tokens, those of largest covariance, that are held to the old policy."""
    ppo_kl_coef: NonNegative = 1.0
    """`kl_cov`: weight of what holds them."""
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
    credit: Literal["episode", "turn"] = "episode"
    """With an `environment`: one advantage for all turns of an episode, or one for each turn, of the rewards from it
    on. `turn` is for environments that pay for turns."""
    mask_truncated_completions: bool = False
    """Leave completions that ran into max_completion_length out of the loss."""
    sync_ref_model: bool = False
    """Move the reference model toward the policy every ref_model_sync_steps steps."""
    ref_model_sync_steps: PositiveInt = 512
    """Steps between two moves of the reference model."""
    ref_model_mixup_alpha: Fraction = 0.6
    """ref = alpha * policy + (1 - alpha) * ref at each move (TR-DPO); 1.0 replaces it."""
    router_aux_loss_coef: NonNegative = 0.0
    """Mixtures of experts: weight of the loss that evens out how many tokens each expert gets, taken within each
    completion. TRL's default is that of the model's configuration."""
    router_bias_update_rate: NonNegative = 0.0
    """Mixtures whose routers have a bias (DeepSeek-V3's `e_score_correction_bias`): after each update it moves by this
    much, up for experts below the mean load, down for those above it (0.001 in DeepSeek-V3)."""
    importance_sampling_mode: (
        Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    """Weigh the loss by the trainer's probability over the sampler's, of a token or of the whole completion, truncated
    or masked; null takes `none` with `rollout.backend: hf` (or where `auto` is that), else `token_truncate`."""
    importance_sampling_clip_max: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0
    """Largest ratio: a larger one counts as this one (truncate), or its tokens give no gradient (mask)."""
    importance_sampling_clip_min: BelowOne | None = None
    """Smallest ratio, likewise; null is off. `token_mask` between 0.5 and 5 is IcePop."""

    @property
    def kl_in_loss(self) -> bool:
        """Is there a KL penalty in the loss (and not, or not only, in the rewards)?"""
        return self.beta > 0 and not self.kl_in_reward

    @property
    def high(self) -> float:
        """Clip range above."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def has_entropy_bonus(self) -> bool:
        return self.entropy_coef > 0 or self.use_adaptive_entropy

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("loss_type"), str):
            return PRESETS.get(given["loss_type"], {}) | given
        return given

    @model_validator(mode="after")
    def _bounds(self) -> AlgorithmConfig:
        problems = []
        if self.delta is not None and self.delta <= 1 + self.epsilon:
            text = f"delta ({self.delta}) must be above 1 + epsilon ({1 + self.epsilon})"
            problems.append(Problem(("delta", "epsilon"), text))
        if self.sync_ref_model and self.beta == 0:
            text = "sync_ref_model needs a reference model: set beta above 0"
            problems.append(Problem(("sync_ref_model", "beta"), text))
        problems += self._loss_problems() + self._entropy_problems() + self._advantage_problems()
        refuse(problems + (self._credit_problems() if self.credit == "turn" else []))
        return self

    def _loss_problems(self) -> list[Problem]:
        name = self.loss_type
        problems = []
        for key, value in PRESETS.get(name, {}).items():
            if (got := getattr(self, key)) != value:
                text = f"{key} is {value} with loss_type {name}, got {got}: leave it out, or take another loss_type"
                problems.append(Problem((key, "loss_type"), text))
        level = ("importance_sampling_level", "loss_type")
        if name in ("gspo", "luspo") and self.importance_sampling_level == "token":
            text = f"importance_sampling_level: {name} is of the sequence's ratio; leave it out"
            problems.append(Problem(level, text))
        if name in ("rloo", "reinforce", "vespo") and self.importance_sampling_level not in (None, "token"):
            text = f"importance_sampling_level has no effect with loss_type {name}; leave it out"
            problems.append(Problem(level, text))
        if name == "cispo" and self.epsilon_high is not None and self.epsilon_high <= 1:
            text = (
                f"epsilon_high ({self.epsilon_high}) bounds the weight itself with loss_type cispo: set it above 1 "
                "(5.0 in ScaleRL), or leave it out"
            )
            problems.append(Problem(("epsilon_high", "loss_type"), text))
        if self.kl_in_reward and self.use_bias_correction_kl:
            text = "use_bias_correction_kl is of the KL in the loss, and kl_in_reward takes it out of there"
            problems.append(Problem(("use_bias_correction_kl", "kl_in_reward"), text))
        if self.clip_cov_lb >= self.clip_cov_ub:
            text = f"clip_cov_lb ({self.clip_cov_lb}) must be below clip_cov_ub ({self.clip_cov_ub})"
            problems.append(Problem(("clip_cov_lb", "clip_cov_ub"), text))
        return problems

    def _entropy_problems(self) -> list[Problem]:
        problems = []
        low, high = self.entropy_coef_min, self.entropy_coef_max
        if self.use_adaptive_entropy and not low <= self.entropy_coef <= high:
            text = (
                f"entropy_coef ({self.entropy_coef}) must be between entropy_coef_min ({low}) and "
                f"entropy_coef_max ({high})"
            )
            keys = ("entropy_coef", "entropy_coef_min", "entropy_coef_max", "use_adaptive_entropy")
            problems.append(Problem(keys, text))
        if self.top_entropy_quantile < 1 and self.loss_type in ("clip_cov", "kl_cov"):
            text = f"top_entropy_quantile and loss_type {self.loss_type} both select tokens: use one of them"
            problems.append(Problem(("top_entropy_quantile", "loss_type"), text))
        return problems

    def _advantage_problems(self) -> list[Problem]:
        problems = []
        if (self.baseline, self.scale_rewards) in (("batch", "group"), ("none", "group"), ("none", "batch")):
            cure = "batch or none" if self.baseline == "batch" else "none"
            text = (
                f"baseline ({self.baseline}) cannot be used with scale_rewards: {self.scale_rewards}, which would "
                f"divide equal rewards by 0; set scale_rewards to {cure}"
            )
            problems.append(Problem(("baseline", "scale_rewards"), text))
        if self.multi_objective_aggregation == "normalize_then_sum":
            return problems + self._normalize_then_sum_problems()
        if self.pass_at_k is not None and self.baseline in ("batch", "none"):
            text = f"pass_at_k needs a baseline of the group: group or leave_one_out, not {self.baseline}"
            problems.append(Problem(("pass_at_k", "baseline"), text))
        if self.pass_at_k is not None and self.scale_rewards == "batch":
            text = "pass_at_k needs scale_rewards: group or none; its deviation is that of a group's subsets"
            problems.append(Problem(("pass_at_k", "scale_rewards"), text))
        return problems

    def _credit_problems(self) -> list[Problem]:
        """What turns can't have advantages of their own with."""
        whole = "cannot be used with credit: turn, which gives each turn of an episode its own advantage:"
        level, loss = self.importance_sampling_level, self.loss_type
        given = {
            "loss_type": loss in ("gspo", "luspo", "rloo", "vespo")
            and f"{loss} {whole} it weighs an episode as a whole. Take dapo, grpo, dr_grpo, cispo or another loss of "
            "tokens",
            "importance_sampling_level": level == "sequence"
            and f"importance_sampling_level: sequence {whole} its ratio is the episode's. sequence_token can",
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None
            and f"off_policy_mask_threshold {whole} it asks for the sign of an episode's",
            "pass_at_k": self.pass_at_k is not None and f"pass_at_k {whole} it is of whole episodes",
            "multi_objective_aggregation": self.multi_objective_aggregation == "normalize_then_sum"
            and f"multi_objective_aggregation: normalize_then_sum {whole} it is of several rewards, and the "
            "environment's alone are by turn",
            "kl_in_reward": self.kl_in_reward
            and self.beta > 0
            and f"kl_in_reward {whole} it is taken off an episode's reward. Leave it out, for a penalty in the loss",
        }
        return [Problem((key, "credit"), text) for key, text in given.items() if text]

    def _normalize_then_sum_problems(self) -> list[Problem]:
        clash = "cannot be used with multi_objective_aggregation: normalize_then_sum, which"
        problems = [
            Problem(
                (key, "multi_objective_aggregation"),
                f"{key} {clash} normalizes in its own way (by group, then by step); leave it out",
            )
            for key, default in (("scale_rewards", "group"), ("baseline", "group"), ("pass_at_k", None))
            if getattr(self, key) != default
        ]
        if self.kl_in_reward:
            text = f"kl_in_reward {clash} takes rewards function by function; leave it out, for a penalty in the loss"
            problems.append(Problem(("kl_in_reward", "multi_objective_aggregation"), text))
        return problems
