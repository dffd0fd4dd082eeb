"""The recipe's schema, and the way from a file and overrides to a ``Recipe``, without torch.

Others take the sections from here, ``load_recipe`` and ``dump_recipe`` from ``load``, ``resume``, ``given`` (what is
no default), ``suites`` (the evaluation suites), and ``chain`` (several recipes) with ``find``, ``hints``, ``problems``,
``yaml_text`` and ``base`` (what sections are made of); the command also takes ``trl`` (a configuration of TRL's as a
recipe).
"""

from grpo.config.algorithm import AlgorithmConfig
from grpo.config.data import DataConfig, MixConfig, RowsConfig, Source
from grpo.config.environment import EnvironmentConfig
from grpo.config.evaluation import EvaluationConfig
from grpo.config.prompts import PromptsConfig
from grpo.config.recipe import Recipe
from grpo.config.rewards import ENVIRONMENT, RewardConfig
from grpo.config.sections import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    ScoringConfig,
    TrackingConfig,
    TrainingConfig,
)
from grpo.config.teacher import TeacherConfig

__all__ = [
    "ENVIRONMENT",
    "AlgorithmConfig",
    "DataConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "LoraConfig",
    "MixConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "Recipe",
    "RewardConfig",
    "RolloutConfig",
    "RowsConfig",
    "ScoringConfig",
    "Source",
    "TeacherConfig",
    "TrackingConfig",
    "TrainingConfig",
]
