"""The recipe: one YAML file describes one run.

This is the schema alone (pydantic v2, unknown keys refused), without torch; its sections are in ``sections.py``,
``algorithm.py``, ``data.py``, ``evaluation.py``, ``health.py``, ``prompts.py``, ``rewards.py``, ``teacher.py`` and
``vllm.py``. ``load.py`` reads files and overrides; ``docs/recipe.md`` is generated from here. Names are TRL's wherever
the meaning is TRL's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from grpo.config.algorithm import AlgorithmConfig
from grpo.config.base import Problem, Section, refuse
from grpo.config.data import DataConfig
from grpo.config.environment import EnvironmentConfig
from grpo.config.evaluation import EvaluationConfig
from grpo.config.expect import ExpectConfig
from grpo.config.health import HealthConfig
from grpo.config.prompts import PromptsConfig
from grpo.config.rewards import ENVIRONMENT, RewardConfig, SourceReward
from grpo.config.sections import (
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    ScoringConfig,
    TrackingConfig,
    TrainingConfig,
)
from grpo.config.teacher import TeacherConfig
from grpo.config.vllm import VllmOptions


class Recipe(Section):
    stage: Literal["grpo", "sft"] = "grpo"
    """`grpo` learns from rewards; `sft` imitates the completion column (cold start, distillation)."""
    model: ModelConfig
    """The model that is trained."""
    data: DataConfig
    """Its tasks: where the rows come from and how a row becomes a prompt."""
    rewards: list[RewardConfig] = Field(default_factory=list)
    """Reward functions; their weighted sum is the reward. With `data.mix` they score every source's completions. With a
    `teacher` there may be none, or all of weight 0: these are measured and not learned from."""
    environment: EnvironmentConfig | None = None
    """Tools and turns: what answers the model within a completion. Without `rewards` the environment's own is the
    reward; beside others it is `{name: environment}` in their list."""
    teacher: TeacherConfig | None = None
    """Distillation: a model whose distributions the trained one learns, beside the rewards or alone."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """How completions are sampled."""
    prompts: PromptsConfig = Field(default_factory=PromptsConfig)
    """Which prompts a step learns from."""
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    """Advantages and the policy loss."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW and the learning rate's schedule."""
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    """The processes that run reward functions."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Held-out accuracy during and after training."""
    training: TrainingConfig
    """The run: its folder, length, batch and rhythm."""
    health: HealthConfig = Field(default_factory=HealthConfig)
    """What to do where the metrics show that a run is failing."""
    expect: list[ExpectConfig] = Field(default_factory=list)
    """What metrics should be at some steps. The run and its report say whether they are."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """Trackers besides `metrics.jsonl`, which is always written."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.algorithm.importance_sampling_mode is None and self.rollout.backend != "auto":
            mode = "none" if self.rollout.backend == "hf" else "token_truncate"
            self.algorithm = self.algorithm.model_copy(update={"importance_sampling_mode": mode})
        if self.teacher is not None and self.teacher.divergence is None:
            usual = "reverse_kl" if self.stage == "grpo" else "forward_kl"
            self.teacher = self.teacher.model_copy(update={"divergence": usual})
        if self.environment is not None and not (self.rewards or self.data.mix or self.teacher):
            self.rewards = [RewardConfig(name=ENVIRONMENT)]
        problems: list[Problem] = self._environment_problems() + self._credit_problems()
        if self.stage == "grpo" and self.teacher is None:
            problems += self._reward_problems()
        functions = self.reward_names()
        if self.evaluation.reward is not None and self.evaluation.reward not in functions:
            text = (
                f"evaluation.reward: {self.evaluation.reward} is not one of rewards ({', '.join(functions) or 'none'})"
            )
            problems.append(Problem(("evaluation.reward", "rewards"), text))
        problems += self._suites_problems()
        if self.training.prompts_per_step % self.algorithm.num_minibatches:
            text = (
                f"training.prompts_per_step ({self.training.prompts_per_step}) is not divisible by "
                f"algorithm.num_minibatches ({self.algorithm.num_minibatches})"
            )
            problems.append(Problem(("training.prompts_per_step", "algorithm.num_minibatches"), text))
        if self.algorithm.sync_ref_model and self.model.lora is not None:
            text = (
                "algorithm.sync_ref_model cannot be used with model.lora: the reference is the model without adapters, "
                "which never moves"
            )
            problems.append(Problem(("algorithm.sync_ref_model", "model.lora"), text))
        if self.algorithm.router_bias_update_rate > 0 and self.model.lora is not None:
            text = (
                "algorithm.router_bias_update_rate cannot be used with model.lora: it moves the model that adapters "
                "are added to, and they alone would then be of no model; use algorithm.router_aux_loss_coef"
            )
            problems.append(Problem(("algorithm.router_bias_update_rate", "model.lora"), text))
        problems += self._optimizer_problems()
        problems += self._prompts_problems()
        problems += self._rollback_problems()
        problems += self._teacher_problems()
        refuse(problems)
        return self

    def _environment_problems(self) -> list[Problem]:
        """An environment where nothing is sampled, or a reward of an environment that there is none of."""
        if self.environment is not None:
            text = "environment: stage sft samples nothing, so there is nothing to answer; leave it out"
            return [Problem(("environment", "stage"), text)] if self.stage == "sft" else []
        return [
            Problem(
                (reward.where(i), "environment"),
                f"{reward.where(i)}: environment is what an environment pays, and the recipe has no environment",
            )
            for i, reward in enumerate(self.functions())
            if reward.name == ENVIRONMENT
        ]

    def _credit_problems(self) -> list[Problem]:
        """Turns can have advantages of their own where an environment pays for them, and nothing else does."""
        if self.algorithm.credit != "turn":
            return []
        key, turns = "algorithm.credit", "algorithm.credit: turn is about rewards that an environment pays for turns"
        if self.environment is None:
            return [Problem((key, "environment"), f"{turns}, and the recipe has no environment")]
        if self.data.mix:
            return [Problem((key, "data.mix"), f"{turns}, and with data.mix sources have rewards of their own")]
        if [reward.name for reward in self.rewards] != [ENVIRONMENT]:
            others = ", ".join(name for name in self.reward_names() if name != ENVIRONMENT)
            text = f"{turns}: it must be the one reward" + (f", without {others}" if others else "")
            return [Problem((key, "rewards"), text)]
        return []

    def _suites_problems(self) -> list[Problem]:
        """Suites that no step would evaluate."""
        evaluation, every = self.evaluation, self.training.eval_every
        if evaluation.suites and self.stage == "sft":
            text = (
                "evaluation.suites: stage sft samples nothing; evaluate its model when it is done: "
                f"grpo eval {self.training.output_dir} --suite {','.join(evaluation.suites)}"
            )
            return [Problem(("evaluation.suites", "stage"), text)]
        if evaluation.suites_every and (not every or evaluation.suites_every % every):
            text = (
                f"evaluation.suites_every ({evaluation.suites_every}) must be a multiple of training.eval_every "
                f"({every}): suites are evaluated with the held-out rows"
            )
            return [Problem(("evaluation.suites_every", "training.eval_every"), text)]
        return []

    def _reward_problems(self) -> list[Problem]:
        """Sources whose completions nothing scores."""
        problems = []
        for i, source in enumerate(self.data.sources()):
            functions = [reward for reward in self.functions() if reward.scores(source.label)]
            own = f"data.mix.{i}.rewards" if source.label else "rewards"
            of = f"{source.where}.rewards ({source.label})" if source.label else "rewards"
            if not functions:
                problems.append(
                    Problem(("rewards", own, "stage"), f"{of}: a grpo recipe needs at least one reward, or a teacher")
                )
            elif all(reward.weight == 0 for reward in functions):
                problems.append(Problem((own,), f"{of}: every weight is 0, there is nothing to learn from"))
        return problems

    def _optimizer_problems(self) -> list[Problem]:
        """What bitsandbytes' paged optimizer cannot be combined with."""
        given = {
            "optimizer.offload": self.optimizer.offload,
            "model.weights": self.model.weights == "bfloat16",
        }
        return [
            Problem(
                ("optimizer.optim", key),
                f"optimizer.optim: paged_adamw_8bit cannot be used with {key}; adamw_8bit can, and with "
                "optimizer.offload: true it holds its state in the host's memory too",
            )
            for key, is_given in given.items()
            if is_given and self.optimizer.optim == "paged_adamw_8bit"
        ]

    def _rollback_problems(self) -> list[Problem]:
        """What ``health.RULE: rollback`` needs: a best model, and so evaluations before the end."""
        rules = [name for name, action in self.health if action == "rollback"]
        if not rules:
            return []
        key, training = f"health.{rules[0]}", self.training
        asks = f"{key}: rollback goes back to the best model"
        if training.save_best is None:
            text = f"{asks}, so set training.save_best (eval/accuracy, or eval/loss with stage: sft)"
            return [Problem((key, "training.save_best"), text)]
        if not self.data.eval_size:
            return [Problem((key, "data.eval_size"), f"{asks}, and with data.eval_size: 0 nothing is evaluated")]
        if not (self.evaluation.at_start or training.eval_every):
            text = f"{asks}, and nothing is evaluated before the end: set training.eval_every or evaluation.at_start"
            return [Problem((key, "training.eval_every", "evaluation.at_start"), text)]
        return []

    def _teacher_problems(self) -> list[Problem]:
        """What a teacher cannot be combined with, and what a run without rewards can't do."""
        if self.teacher is None:
            return []
        rollout, algorithm = self.rollout, self.algorithm
        problems = self.teacher.problems(self.stage, temperature=rollout.temperature, truncated=rollout.truncates)
        of_rewards = {
            "prompts.dynamic_sampling": self.prompts.dynamic_sampling,
            "prompts.replay_groups": self.prompts.replay_groups > 0,
            "prompts.curriculum": self.prompts.curriculum,
            "algorithm.kl_in_reward": algorithm.kl_in_reward and algorithm.beta > 0,
            "algorithm.multi_objective_aggregation": algorithm.multi_objective_aggregation == "normalize_then_sum",
        }
        if self.stage == "grpo" and not self.learns_from_rewards:
            problems += [
                Problem((key, "rewards"), f"{key} is about rewards, and this recipe learns from its teacher alone")
                for key, given in of_rewards.items()
                if given
            ]
        return problems

    @property
    def learns_from_rewards(self) -> bool:
        """Are there rewards of a weight other than 0?"""
        return any(reward.weight != 0 for reward in self.functions())

    def with_model(self, name: str) -> Recipe:
        """The recipe with another model, a folder or hub id. Adapters, 4 bits and revision are of its own and go."""
        others = {"name": name, "lora": None, "load_in_4bit": False, "revision": None}
        return self.model_copy(update={"model": self.model.model_copy(update=others)})

    def with_backend(self, backend: Literal["hf", "vllm"]) -> Recipe:
        """The recipe with what ``rollout.backend: auto`` turned out to be, checked again.

        With hf, settings of vLLM's are back at their defaults: they were for a machine that has it. Raises pydantic's
        ValidationError where other settings do not fit the backend.
        """
        values = self.model_dump()
        rollout = values["rollout"] | {"backend": backend}
        if backend == "hf":
            rollout |= VllmOptions().model_dump()
        return Recipe.model_validate(values | {"rollout": rollout})

    def _prompts_problems(self) -> list[Problem]:
        """What the choice of prompts, and of advantages, cannot be combined with."""
        prompts, rollout, k = self.prompts, self.rollout, self.algorithm.pass_at_k
        problems: list[Problem] = []
        if prompts.replay_groups and rollout.truncates:
            text = (
                "prompts.replay_groups needs importance ratios to the distribution sampled from, which rollout.top_p, "
                "top_k and min_p cut: set them to 1.0, 0 and null"
            )
            cut = ("rollout.top_p", "rollout.top_k", "rollout.min_p")
            problems.append(Problem(("prompts.replay_groups", *cut), text))
        if k is not None and k >= rollout.num_generations:
            text = (
                f"algorithm.pass_at_k ({k}) must be below rollout.num_generations ({rollout.num_generations}): it "
                "compares subsets of k completions"
            )
            problems.append(Problem(("algorithm.pass_at_k", "rollout.num_generations"), text))
        return problems

    def sends_adapters(self) -> bool:
        """Do LoRA adapters go to vLLM apart from the weights that they are added to? Over 4-bit weights always: merging
        would round them."""
        return self.model.lora is not None and (self.model.load_in_4bit or self.rollout.vllm_lora_sync == "adapter")

    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and completion together, evaluation included."""
        suites = self.evaluation.suite_sampling.max_completion_length if self.evaluation.suites else None
        longest = max(self.rollout.max_completion_length, self.evaluation.max_completion_length or 0, suites or 0)
        answers = self.environment.max_environment_tokens if self.environment is not None else 0
        return self.data.max_prompt_length + longest + answers

    def functions(self) -> list[RewardConfig]:
        """All reward functions: those of `rewards`, then those of the sources of `data.mix`. Sources that say the same
        of a reward share it."""
        found: list[RewardConfig] = list(self.rewards)
        own: list[tuple[RewardConfig, SourceReward]] = []
        for source in self.data.sources():
            for j, reward in enumerate(source.rewards):
                alike = (of for known, of in own if known == reward and source.label not in of.sources)
                same = next(alike, None)
                if same is None:
                    same = SourceReward(**reward.model_dump(), sources=[], place=f"{source.where}.rewards[{j}]")
                    own.append((reward, same))
                same.sources.append(source.label)
        return found + [other for _, other in own]

    def judged_by(self, source: str = "") -> str:
        """The name of the reward whose value 1 counts as solved; of a source of `data.mix` the one that judges its
        completions: `evaluation.reward` where it scores them, or the source's first."""
        functions = list(zip(self.reward_names(), self.functions(), strict=True))
        scoring = [(name, reward) for name, reward in functions if reward.scores(source)] or functions
        named = [name for name, _ in scoring if name == self.evaluation.reward]
        own = [name for name, reward in scoring if isinstance(reward, SourceReward)]
        return (named or own or [name for name, _ in scoring])[0]

    def reward_names(self) -> list[str]:
        """The rewards' names in metrics and in `evaluation.reward`: a built-in's own, else the function's after the
        colon; the second of the same name is `name#2`."""
        names = [reward.name or str(reward.path).rpartition(":")[2] for reward in self.functions()]
        uses = [names[:i].count(name) for i, name in enumerate(names)]
        return [f"{name}#{before + 1}" if before else name for name, before in zip(names, uses, strict=True)]
