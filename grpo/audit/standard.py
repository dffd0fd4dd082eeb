"""The standard that ``grpo audit`` holds a reward to: how much it must pay for right and for wrong completions."""

from __future__ import annotations

from dataclasses import dataclass

from grpo.audit.programs import HARD_CODED
from grpo.config import RewardConfig
from grpo.scoring.functions import judged_by

ANSWERING = ("countdown", "gsm8k", "math", "code")
TRUNCATED = "the gold, truncated"


@dataclass(frozen=True)
class Standard:
    """How much a reward must pay.

    ``judges`` is what the reward judges: ``answer``, ``form``, or None for shaping, which is reported and not judged. A
    right completion must get at least ``gold_at_least``. A cheat may get at most ``cheat_at_most``; where that is None,
    it must get less than ``cheat_below``. A cheat on a user's function must get less than the row's right completion.
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
    """One of ANSWERING (for ``cosine`` its verifier), ``format``, ``shaping``, or ``user``: for the answer, in a form
    that is not known (one's own, or a built-in of another name). What a built-in judges its module says."""
    if reward.path is not None:
        return "shaping" if reward.shaping else "user"
    name = str(reward.args.get("verifier")) if reward.name == "cosine" else str(reward.name)
    if name in ANSWERING:
        return name
    return {"answer": "user", "form": "format"}.get(judged_by(name), "shaping")


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
