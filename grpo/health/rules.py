"""The rules: what each sees, why it may be, and what to do.

A rule looks at the metrics of the steps so far and returns what it sees in words, or None. Thresholds are far from what
healthy runs of the recipes do; each is a line here, so that a reader can judge it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from grpo.health.history import History

STEPS = 5  # a finding of one step may be chance


@dataclass(frozen=True)
class Rule:
    """``sees`` returns a statement with its figures, or None where all is well."""

    name: str
    sees: Callable[[History], str | None]
    cause: str
    cure: str


def _no_signal(history: History) -> str | None:
    share, reward = history.mean("frac_reward_zero_std"), history.mean("reward")
    if not (share >= 0.95 and reward == reward):  # without any reward, ``unscored`` speaks
        return None
    without = ", and no tool was called" if history.mean("tools/call_frequency") == 0 else ""
    return f"{share:.0%} of groups had no signal over {STEPS} steps (mean reward {reward:.3f}){without}"


def _all_alike(history: History) -> str | None:
    """Short answers to solved tasks are alike too, but while most groups have a signal there is something to learn."""
    share, without = history.mean("completions/unique_ratio"), history.mean("frac_reward_zero_std")
    if not (share <= 0.3 and without >= 0.6):
        return None
    return f"{share:.0%} of a group's completions differ, and {without:.0%} of groups had no signal, over {STEPS} steps"


def _never_correct(history: History) -> str | None:
    """A function that judges answers finds wrong ones alone. One that judges the form finds no wrong ones."""
    wrong = [of["wrong"] for of in history.verdicts.values() if of["wrong"] and not of["correct"]]
    if history.steps < 4 * STEPS or not wrong:
        return None
    return f"{wrong[0]} answers were found in the right form in {history.steps} steps, and none was correct"


def _accuracy_below_start(history: History) -> str | None:
    if not history.evaluations or not history.evaluations[-1].high < history.evaluations[0].low:
        return None
    first, last = history.evaluations[0], history.evaluations[-1]
    return f"held-out accuracy is {last.accuracy:.3f}, and was {first.accuracy:.3f} at the start"


def _reward_without_accuracy(history: History) -> str | None:
    """The last evaluation is clearly below the best one, and the steps before it were paid more."""
    if not history.evaluations:
        return None
    best, last = max(history.evaluations, key=lambda one: one.accuracy), history.evaluations[-1]
    paid_before = best.reward if best.reward == best.reward else history.mean_at_start("reward")
    if not (last.high < best.low and last.reward > paid_before):
        return None
    return (
        f"the reward rose from {paid_before:.3f} to {last.reward:.3f}, while held-out accuracy fell from "
        f"{best.accuracy:.3f} (step {best.step}) to {last.accuracy:.3f}"
    )


def _length_collapse(history: History) -> str | None:
    start, now = (of("completions/mean_length") for of in (history.mean_at_start, history.mean))
    paid_less = history.mean("reward") <= history.mean_at_start("reward")
    return f"completions have {now:.0f} tokens, and had {start:.0f}" if now < 0.25 * start and paid_less else None


def _entropy_collapse(history: History) -> str | None:
    start, now = history.mean_at_start("entropy"), history.mean("entropy")
    return f"entropy is {now:.4f} nats a token, and was {start:.4f}" if now < 0.02 and now < 0.2 * start else None


def _cut_off(history: History) -> str | None:
    share = history.mean("completions/clipped_ratio")
    return f"{share:.0%} of completions reached max_completion_length, over {STEPS} steps" if share > 0.5 else None


def _kl_blow_up(history: History) -> str | None:
    kl = history.mean("kl")
    return f"the KL divergence from the reference is {kl:.2f} nats a token" if kl > 1.0 else None


def _clipped(history: History) -> str | None:
    share = history.mean("clip_ratio/region_mean")
    return f"{share:.0%} of tokens were clipped over {STEPS} steps" if share > 0.3 else None


def _sampler_mismatch(history: History) -> str | None:
    gap = history.mean("sampling/sampling_logp_difference/mean")
    return f"sampler and trainer differ by {gap:.3f} nats a token" if gap > 0.1 else None


def _gradient(history: History) -> str | None:
    now, usual = history.mean("grad_norm", 1), history.usual("grad_norm")
    return f"the gradient's norm is {now:.3g}, and is {usual:.3g} in most steps" if now > 20 * usual > 0 else None


def _slow_reward(history: History) -> str | None:
    waited, whole = history.mean("time/score"), history.mean("step_time")
    return f"{waited / whole:.0%} of a step waits for reward functions" if waited > 0.5 * whole else None


def _unscored(history: History) -> str | None:
    share = history.mean("frac_unscored")
    return f"{share:.0%} of completions have no reward, over {STEPS} steps" if share > 0.05 else None


RULES = (
    Rule(
        "no_signal",
        _no_signal,
        "all completions of a group are paid the same: the tasks are too hard or too easy for this model, or it never "
        "finds the form that the reward asks for, or that of a tool's call (with data.template: none, the prompt must "
        "tell it which tools there are)",
        "near a reward of 0, take easier tasks, a stronger or instructed model, or a supervised stage first; near the "
        "largest reward, harder tasks. `prompts.dynamic_sampling: true` draws on until groups differ",
    ),
    Rule(
        "all_alike",
        _all_alike,
        "the policy says nearly the same every time, so a group compares an answer with itself",
        "raise rollout.temperature, lower optimizer.learning_rate, or set algorithm.entropy_coef",
    ),
    Rule(
        "never_correct",
        _never_correct,
        "the answers in the rows may be of another type or form than the reward compares with, or far too hard",
        "`grpo audit RECIPE` tries the right answers of the rows; read rollouts/ for a completion that should be paid",
    ),
    Rule(
        "accuracy_below_start",
        _accuracy_below_start,
        "the policy has unlearned the task: a learning rate that is too high, or a reward that pays something else",
        "lower optimizer.learning_rate, set algorithm.beta, or go back to an earlier checkpoint (--resume-from; with "
        "health.accuracy_below_start: rollback the run does so itself)",
    ),
    Rule(
        "reward_without_accuracy",
        _reward_without_accuracy,
        "the reward pays something that is not a correct answer: form, length, or a hole in the verifier",
        "read the best paid completions of the last rollouts/; lower the weight of shaping rewards",
    ),
    Rule(
        "length_collapse",
        _length_collapse,
        "short answers are paid as well as long ones, or an update went wrong",
        "look at rollouts/; a loss_type with a mean over tokens (dapo) does not favour short answers",
    ),
    Rule(
        "entropy_collapse",
        _entropy_collapse,
        "the policy has become certain, and finds nothing new",
        "raise algorithm.epsilon_high or set algorithm.entropy_coef; lower optimizer.learning_rate",
    ),
    Rule(
        "cut_off",
        _cut_off,
        "completions are longer than they may be: they end without an answer, and are paid nothing",
        "raise rollout.max_completion_length, or set algorithm.mask_truncated_completions; where accuracy rises too, "
        "the model thinks longer",
    ),
    Rule(
        "kl_blow_up",
        _kl_blow_up,
        "the policy runs away from the reference faster than the penalty holds it",
        "lower optimizer.learning_rate, or raise algorithm.beta",
    ),
    Rule(
        "clipped",
        _clipped,
        "updates are so large that most of what they learn is cut off, or the data are of an older policy",
        "lower optimizer.learning_rate, algorithm.num_iterations or rollout.max_staleness",
    ),
    Rule(
        "sampler_mismatch",
        _sampler_mismatch,
        "the engine computes with other weights, in another type, or at another temperature than the trainer",
        "rollout.vllm_dtype=float32 shows whether it is rounding; algorithm.importance_sampling_mode corrects for it",
    ),
    Rule(
        "gradient",
        _gradient,
        "one step is far from the others: a rare reward, a broken row, or an update that diverges",
        "optimizer.max_grad_norm clips it; lower optimizer.learning_rate if it comes again",
    ),
    Rule(
        "slow_reward",
        _slow_reward,
        "reward functions are slower than the model",
        "raise scoring.workers, or make the function faster",
    ),
    Rule(
        "unscored",
        _unscored,
        "a reward function or an environment fails, takes longer than its timeout, or returns None",
        "the log counts the causes; scoring.timeout is how long a call may take",
    ),
)
