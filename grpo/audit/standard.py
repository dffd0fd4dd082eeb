"""What ``grpo audit`` measures a reward by: what it judges, and what right and wrong completions must be worth."""

from __future__ import annotations

from dataclasses import dataclass

from grpo.audit.programs import HARD_CODED
from grpo.config import RewardConfig

ANSWERING = ("countdown", "gsm8k", "math", "code")
TRUNCATED = "the gold, truncated"


@dataclass(frozen=True)
class Standard:
    """``judges`` is ``answer``, ``form``, or None for shaping, which is told and not judged.

    A right completion must be worth ``gold_at_least``; a cheat at most ``cheat_at_most``, or where that is None less
    than ``cheat_below``, which for a user's function is what the row's right completion is worth.
    """

    judges: str | None
    gold_at_least: float = 1.0
    cheat_at_most: float | None = 0.0
    cheat_below: float | None = None
    users_own: bool = False
    partial: bool = False  # pays for some of a row's tests

    def paid_cheat(self, name: str, value: float, gold: float | None) -> bool:
        """Whether a cheat is worth more than it may be."""
        if self.users_own:
            # A function that is not told the status cannot know; algorithm.mask_truncated_completions does.
            return name != TRUNCATED and value >= (self.gold_at_least if gold is None else gold)
        if self.partial and name == HARD_CODED:
            return value >= 1
        if self.cheat_at_most is not None:
            return value > self.cheat_at_most
        return self.cheat_below is not None and value >= self.cheat_below


def kind_of(reward: RewardConfig) -> str:
    """One of ANSWERING (for ``cosine`` its verifier), ``format``, ``user`` for a function of one's own, ``shaping``."""
    if reward.path is not None:
        return "user"
    name = str(reward.args.get("verifier")) if reward.name == "cosine" else str(reward.name)
    return name if name in (*ANSWERING, "format") else "shaping"


def standard_of(reward: RewardConfig) -> Standard:
    kind = kind_of(reward)
    if kind == "user":
        return Standard("answer", cheat_at_most=None, users_own=True)
    if kind == "shaping":
        return Standard(None)
    if reward.name == "cosine":
        least = float(reward.args.get("min_value_correct", 0.5))
        return Standard("answer", gold_at_least=least, cheat_at_most=None, cheat_below=least)
    if kind == "format":
        graded = bool(reward.args.get("graded"))
        return Standard("form", cheat_at_most=None if graded else 0.0, cheat_below=1.0)
    return Standard("answer", partial=bool(reward.args.get("partial_credit")))
