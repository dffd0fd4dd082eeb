"""The recipe's schema, and the way from a file and overrides to a ``Recipe``, without torch.

Others take the sections from here, ``load_recipe`` and ``dump_recipe`` from ``load``, ``resume``, and ``given`` (what
is no default); the command also takes ``find``, ``hints``, ``yaml_text`` and ``trl`` (a configuration of TRL's as a
recipe).
"""

from grpo.config.algorithm import AlgorithmConfig
from grpo.config.data import DataConfig
from grpo.config.prompts import PromptsConfig
from grpo.config.recipe import Recipe
from grpo.config.sections import (
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    ScoringConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "AlgorithmConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "Recipe",
    "RewardConfig",
    "RolloutConfig",
    "ScoringConfig",
    "TrackingConfig",
    "TrainingConfig",
]
