"""GRPO training for small models that learn to reason. The CLI is ``grpo``; the loop is ``grpo/trainer.py``."""

__version__ = "0.1.0"
