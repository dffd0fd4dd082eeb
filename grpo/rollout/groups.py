"""The groups that a step learns from: one round of prompts, or rounds until enough of their groups have a signal.

Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2) draws on where completions are all right or all wrong. Every
process sees all groups after each round, so all make the same rounds; the prompts drawn do not depend on how many
processes there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from accelerate.utils import gather_object

from grpo.advantages import rewards_array, step_advantages
from grpo.config import Recipe
from grpo.metrics import Clock
from grpo.packing import counts_in_loss
from grpo.rollout.rollouts import Rollouts
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Prompt


@dataclass
class Drawn:
    """``sampled`` are all groups that this step's policy made, ``with_signal`` those of them that say something, and
    ``groups`` the P to learn from: of those sampled, or ``replayed`` of them from earlier steps."""

    sampled: list[Group]
    with_signal: list[Group]
    groups: list[Group]
    replayed: int
    rounds: int

    def metrics(self) -> dict[str, float]:
        """What became of the groups: drawn = kept + without signal, but learned from, + discarded."""
        fresh = len(self.groups) - self.replayed
        kept = min(len(self.with_signal), fresh)
        counts = {
            "rounds": self.rounds,
            "groups_drawn": len(self.sampled),
            "groups_kept": kept,
            "groups_discarded": len(self.sampled) - fresh,
            "groups_replayed": self.replayed,
            "groups_without_signal": fresh - kept,
        }
        return {f"dynamic_sampling/{name}": float(number) for name, number in counts.items()}


def draw_groups(
    recipe: Recipe,
    rollouts: Rollouts,
    scorer: Scorer,
    prompts: Iterator[Prompt],
    replay: Sequence[Group],
    step: int,
    clock: Clock,
) -> Drawn:
    """Sample and score groups of ``prompts``, on all processes together; with dynamic sampling in up to
    ``max_resample`` more rounds, until ``prompts_per_step`` groups have a signal. Where that is not reached, groups of
    ``replay`` fill up, the last ones first, and then those that were sampled without a signal."""
    P = recipe.training.prompts_per_step
    most = 1 + (recipe.prompts.max_resample if recipe.prompts.dynamic_sampling else 0)
    scoring = scorer.start(step)
    asked: list[Prompt] = []
    sampled: list[Group] = []
    signal: list[bool] = []
    rounds = 0
    while rounds < most and sum(signal) < P:
        new = list(islice(prompts, round_size(P, len(sampled), sum(signal))))
        with clock("rollout"):
            mine = rollouts.take(step, new, on_group=scoring.add, before=asked)
        with clock("score"):  # what is left of it: groups are scored while others are sampled
            scoring.finish()
            sampled += gather_object(mine)  # every process now holds all groups, in the order of prompts
        asked += new
        rounds += 1
        signal = has_signal(recipe, sampled)
    return choose(sampled, signal, replay, P, rounds)


def round_size(wanted: int, drawn: int, with_signal: int) -> int:
    """How many prompts to draw next: as many as should give what is missing, by the share that had a signal so far; in
    no round more than in the first."""
    if with_signal == 0:
        return wanted
    missing = wanted - with_signal
    return min(wanted, -(-missing * drawn // with_signal))


def has_signal(recipe: Recipe, groups: list[Group]) -> list[bool]:
    """Whether any completion that counts in the loss has an advantage, group by group."""
    weights_F = [reward.weight for reward in recipe.rewards]
    advantages_PG = step_advantages(rewards_array(groups), groups, weights_F, recipe.algorithm)
    return [
        any(
            advantage != 0 and counts_in_loss(completion, reward, recipe.algorithm)
            for completion, reward, advantage in zip(group.completions, group.rewards, advantages_G, strict=True)
        )
        for group, advantages_G in zip(groups, advantages_PG, strict=True)
    ]


def choose(sampled: list[Group], signal: list[bool], replay: Sequence[Group], wanted: int, rounds: int) -> Drawn:
    """The first ``wanted`` groups with a signal; where there are fewer, the last of ``replay``; and then the first of
    those without a signal. Those of this step in the order sampled, then those of earlier ones."""
    loud = [i for i, has in enumerate(signal) if has]
    silent = [i for i, has in enumerate(signal) if not has]
    missing = max(wanted - len(loud), 0)
    replayed = list(reversed(replay))[:missing]
    chosen = sorted(loud[:wanted] + silent[: missing - len(replayed)])
    groups = [sampled[i] for i in chosen] + replayed
    return Drawn(sampled, [sampled[i] for i in loud], groups, len(replayed), rounds)
