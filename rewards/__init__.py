"""Verifiers: one file each, built on ``verify(...) -> Verdict``, usable without the trainer.

``rewards.<name>.<name>_reward`` is the reward function of recipes' ``rewards: [{name: <name>}]``. It has TRL's
signature, so it works in any trainer that speaks it. ``JUDGES`` of its module says what it judges: the ``answer``, the
``form``, or neither (``shaping``), which ``grpo audit`` holds it to; ``check_row(row)`` of it says why no completion
could be right for a row, or None. Nothing here imports ``grpo`` or torch.
"""

REWARDS = ("code", "cosine", "countdown", "format", "gsm8k", "language", "math", "overlong", "repetition", "similarity")
"""Every built-in reward by name. A test holds this equal to the modules that define ``<name>_reward``."""
