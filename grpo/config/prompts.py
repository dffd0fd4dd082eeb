"""The recipe's `prompts` section: which prompts a step learns from; docs/sampling.md."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from grpo.config.base import Fraction, NonNegativeInt, PositiveInt, Section


class PromptsConfig(Section):
    dynamic_sampling: bool = False
    """Keep drawing prompts until `training.prompts_per_step` groups have a signal: not all completions right or all
    wrong (DAPO)."""
    max_resample: PositiveInt = 4
    """With dynamic_sampling: most rounds of drawing after the first. A step still short then takes groups without
    signal, and says how many."""
    replay_groups: NonNegativeInt = 0
    """Groups with signal kept from earlier steps, the newest so many; they fill up a step that is short of signal, each
    once, off-policy with their importance ratios. 0 keeps none."""
    curriculum: bool = False
    """Draw prompts by their pass rate so far, not epoch by epoch: one solved always, or never, comes back rarely."""
    curriculum_floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Weight of a prompt solved always or never, where one solved half of the time, or not yet seen, has 1."""
    curriculum_newest: Annotated[Fraction, Field(gt=0)] = 0.5
    """Share of the newest visit in a prompt's pass rate; the rest is the rate before. 1 forgets what was before."""
