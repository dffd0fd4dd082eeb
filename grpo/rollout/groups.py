"""The groups that a step learns from: one round of prompts, or rounds until enough of their groups have a signal.

A group has no signal where its completions are all right or all wrong. Dynamic sampling (DAPO, arXiv:2503.14476,
section 3.2) then samples further prompts. Every process sees all groups after each round, so all processes make the
same rounds; which prompts are drawn does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from grpo.advantages import rewards_array, step_advantages
from grpo.config import AlgorithmConfig, Recipe
from grpo.metrics import Clock
from grpo.packing import counts_in_loss
from grpo.rollout.rollouts import Rollouts
from grpo.run.exchange import gather_groups
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Prompt


@dataclass
class Drawn:
    """The outcome of a step's rounds.

    ``sampled`` are all groups that this step's policy made; ``with_signal`` are the sampled groups that have a signal.
    ``groups`` are the P groups to learn from; the last ``replayed`` of them are from earlier steps, the others sampled.
    """

    sampled: list[Group]
    with_signal: list[Group]
    groups: list[Group]
    replayed: int
    rounds: int

    def metrics(self) -> dict[str, float]:
        """Counts of groups. drawn = kept + without_signal (these are learned from all the same) + discarded."""
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
    """Take and score groups, on all processes together; ``prompts`` are those behind what is already asked for.

    With dynamic sampling there are up to ``max_resample`` more rounds, until ``prompts_per_step`` groups have a signal.
    Missing groups are taken from ``replay``, the last ones first, and then from those sampled without a signal.
    """
    P, weights_F = recipe.training.prompts_per_step, [reward.weight for reward in recipe.functions()]
    most = 1 + (recipe.prompts.max_resample if recipe.prompts.dynamic_sampling else 0)
    scoring = scorer.start(step)
    sampled: list[Group] = []
    signal: list[bool] = []
    rounds = 0
    while rounds < most and sum(signal) < P:
        wanted = round_size(P, len(sampled), sum(signal))
        with clock("rollout"):
            mine = rollouts.take(step, prompts, wanted, on_group=scoring.add)
        with clock("score"):  # the rest of scoring: groups are scored while others are sampled
            scoring.finish()
            sampled += gather_groups(mine)
        rounds += 1
        signal = has_signal(sampled, weights_F, recipe.algorithm)
    return choose(sampled, signal, replay, P, rounds)


def round_size(wanted: int, drawn: int, with_signal: int) -> int:
    """How many prompts to draw next: enough for the missing groups if the same share has a signal as so far.

    A round never draws more prompts than the first one did.
    """
    if with_signal == 0:
        return wanted
    missing = wanted - with_signal
    return min(wanted, -(-missing * drawn // with_signal))


def has_signal(groups: list[Group], weights_F: list[float], algorithm: AlgorithmConfig) -> list[bool]:
    """For each group, whether any completion that counts in the loss has an advantage other than 0.

    ``weights_F`` are the weights of the reward functions.
    """
    advantages = step_advantages(rewards_array(groups), groups, weights_F, algorithm)
    return [
        any(
            np.any(advantage != 0) and counts_in_loss(completion, reward, algorithm)
            for completion, reward, advantage in zip(group.completions, group.rewards, advantages_G, strict=True)
        )
        for group, advantages_G in zip(groups, advantages, strict=True)
    ]


def choose(sampled: list[Group], signal: list[bool], replay: Sequence[Group], wanted: int, rounds: int) -> Drawn:
    """Choose ``wanted`` groups: the first with a signal, then the last of ``replay``, then the first without a signal.

    This step's groups come first, in the order in which they were sampled; groups of ``replay`` follow.
    """
    loud = [i for i, has in enumerate(signal) if has]
    silent = [i for i, has in enumerate(signal) if not has]
    missing = max(wanted - len(loud), 0)
    replayed = list(reversed(replay))[:missing]
    chosen = sorted(loud[:wanted] + silent[: missing - len(replayed)])
    groups = [sampled[i] for i in chosen] + replayed
    return Drawn(sampled, [sampled[i] for i in loud], groups, len(replayed), rounds)
