"""What a probe's figures mean for a run: each finding with its reason and its cure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """Of the groups that were sampled. ``accuracy``, ``verdicts`` (shares of completions) and ``answer_signal`` (the
    share of groups in which it differs) are those of the reward that judges the answer."""

    groups: int
    completions: int
    with_signal: float
    signal_low: float
    signal_high: float
    answer_signal: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    pass_at_G: float
    reward: float
    cut_off: float
    unique: float
    unscored: float
    mean_length: float
    mean_prompt: float
    entropy: float
    sampler_difference: float
    verdicts: Mapping[str, float]
    seconds: float
    mean_environment: float = 0.0  # tokens that an environment adds to a completion


@dataclass(frozen=True)
class Finding:
    name: str
    text: str
    cure: str


FORM = ("no_answer", "unparseable")
FEW = 0.05  # of the groups: with fewer, most steps learn nothing


def findings(figures: Figures, unpaid: list[str]) -> list[Finding]:
    """Why a run would not learn, most likely reason first; empty where nothing speaks against it. ``unpaid`` are the
    lines of the audit of the rows' own right answers."""
    found = [*_of_the_reward(figures, unpaid), *_of_the_form(figures), *_of_the_signal(figures)]
    if figures.sampler_difference > 0.1:
        found.append(
            Finding(
                "sampler_mismatch",
                f"sampler and trainer differ by {figures.sampler_difference:.3f} nats a token",
                "try rollout.vllm_dtype=float32, or rollout.backend=hf",
            )
        )
    return found


def _of_the_reward(figures: Figures, unpaid: list[str]) -> list[Finding]:
    found = [
        Finding("gold_of_another_type", line, "grpo audit RECIPE tries every form, and says which is paid")
        for line in unpaid
    ]
    if figures.unscored > 0.05:
        found.append(
            Finding(
                "unscored",
                f"{figures.unscored:.0%} of the completions have no reward: the function failed or took too long",
                "the log has the causes; scoring.timeout is how long a call may take",
            )
        )
    return found


def _of_the_form(figures: Figures) -> list[Finding]:
    ended = 1 - figures.verdicts.get("truncated", 0.0)
    without_form = sum(figures.verdicts.get(name, 0.0) for name in FORM) / max(ended, 1e-9)
    if figures.cut_off > 0.8:
        return [
            Finding(
                "all_cut",
                f"{figures.cut_off:.0%} of the completions reach max_completion_length before they end",
                "raise rollout.max_completion_length; a base model may need a stop string (rollout.stop) to end",
            )
        ]
    if without_form > 0.9 and figures.accuracy == 0:
        return [
            Finding(
                "form_never_found",
                f"{without_form:.0%} of the completions that end have no answer in the form that is asked for",
                "show the form in the prompt (data.template), take an instructed model, or a supervised stage first",
            )
        ]
    return []


def _of_the_signal(figures: Figures) -> list[Finding]:
    if figures.accuracy_low > 0.95 or figures.accuracy == 1:
        return [Finding("all_solved", f"{figures.accuracy:.0%} are solved already", "take harder tasks")]
    if figures.unique <= 1.5 / max(figures.completions / max(figures.groups, 1), 1):
        return [
            Finding(
                "all_alike",
                "the completions of a group are the same text, so none is better than another",
                "raise rollout.temperature to 1; top_k, top_p and min_p cut off what differs",
            )
        ]
    if figures.with_signal < FEW:
        return [
            Finding(
                "no_signal",
                f"{figures.with_signal:.0%} of the groups have a signal (mean reward {figures.reward:.3f})",
                "take easier tasks, a stronger model, a larger rollout.num_generations, or a supervised stage first",
            )
        ]
    if figures.answer_signal < FEW:
        return [
            Finding(
                "signal_of_the_form_alone",
                f"groups differ, but right and wrong answers in {figures.answer_signal:.0%} of them alone (accuracy "
                f"{figures.accuracy:.3f}): a run would learn the form of an answer, and little more",
                "take easier tasks or a stronger model; a format reward alone teaches nothing else",
            )
        ]
    return []
