"""What flows through a step, and the legend of dimension suffixes.

Tensor and array names end in the dimensions they have, in order:

    P  prompts in a step            B  sequences in a micro-batch     V  vocabulary
    G  completions a prompt         T  tokens of a completion         H  hidden size
    R  rows the model reads         N  tokens of a row

``rewards_PG`` is prompts by completions; ``logps_BT`` is sequences by tokens of their completions: position ``t``
describes the completion's token ``t`` itself (its logprob given its prompt and the tokens before it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REWARD_KEYWORDS = frozenset(
    {
        *("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"),  # TRL's
        *("status", "prefill", "log_verdict"),  # ours
    }
)
"""Keyword arguments that the trainer itself gives to reward functions. No column of the rows may have such a name."""


class Status(str, Enum):
    """Why a completion ended. Never encoded as a reward."""

    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"  # max_completion_length was reached first
    ERROR = "error"  # the backend gave up on it; it has no reward


@dataclass(frozen=True)
class Prompt:
    """One task instance.

    ``id`` is its row in the dataset: stable over epochs, restarts and processes, and part of the key of every random
    draw made for it. ``prompt`` is what reward functions see (a string, or messages for chat data); ``text`` is what
    the model sees, template applied, and ``token_ids`` its encoding. ``prefill`` is the tail of ``text`` that belongs
    to the answer (``"<think>"``): verifiers that check a format put it before the completion. ``columns`` are the
    row's other columns, handed to reward functions. ``source`` is the label of the source of `data.mix` that it comes
    from; empty without.
    """

    id: int
    prompt: str | list[dict[str, str]]
    text: str
    token_ids: list[int]
    prefill: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class VersionSpan:
    """Tokens ``[start, end)`` of a completion were sampled by policy ``version`` (steps completed by then)."""

    start: int
    end: int
    version: int


@dataclass
class Completion:
    """One sampled answer: its tokens (a final end-of-sequence token included) and how they came about.

    ``sampler_logprobs[i]`` is the log-probability of ``token_ids[i]`` under the distribution it was actually drawn
    from: after temperature and after top-k/top-p/min-p truncation (renormalized); nan where an engine could not say.
    ``text`` has special tokens removed.
    Both sequences are the backend's lists, or arrays of numbers where the completion has come from another process.
    """

    token_ids: Sequence[int]
    sampler_logprobs: Sequence[float]
    status: Status
    text: str
    versions: list[VersionSpan]


@dataclass
class Group:
    """A prompt with its G completions and, after scoring, their rewards.

    ``rewards[g]`` is the weighted sum over reward functions, or None where no function could score the completion.
    ``rewards_by_function[name][g]`` are the parts; ``verdicts[name]`` counts the reasons that the function gave, and
    ``said[name][g]`` is the reason for one completion (``scored`` or ``unscored`` of a function that gives none).
    ``extra_metrics`` holds what functions logged, as ``rewards/NAME/logged/METRIC``.
    ``replayed``: an earlier step's policy sampled it, so the update needs a ratio to that policy.
    """

    prompt: Prompt
    completions: list[Completion]
    rewards: list[float | None] = field(default_factory=list)
    rewards_by_function: dict[str, list[float | None]] = field(default_factory=dict)
    verdicts: dict[str, dict[str, int]] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)
    extra_metrics: dict[str, list[float]] = field(default_factory=dict)
    extra_columns: dict[str, list[Any]] = field(default_factory=dict)
    replayed: bool = False


@dataclass
class TrainedSequence:
    """One prompt+completion as the update sees it: what ``packing`` arranges into micro-batches.

    ``weight`` is 0 for padding sequences that only keep processes in step with each other, else 1.
    """

    prompt_ids: list[int]
    completion_ids: Sequence[int]
    sampler_logprobs: Sequence[float]
    advantage: float
    valid: bool = True  # False: left out of loss and denominators (truncated and masked, or unscorable)
    old_logprobs: Sequence[float] | None = None
    ref_logprobs: list[float] | None = None
    kept: list[float] | None = None  # 0 at tokens that a selection excludes, else 1; None without one
    log_left: list[float] | None = None  # log of what truncation leaves of the old policy's probability
    weight: float = 1.0
    uncounted: tuple[int, ...] = ()  # places of tokens that do not count: the sampler gave no log-probability

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Layout:
    """What is where in a row of N packed tokens: first every prompt, once; then the completions, prompt by prompt.

    ``segments`` are the bounds of prompts and completions (P + B + 1 numbers, from 0 to N), ``groups`` those of each
    prompt's completions taken together (P + 1 numbers, from where the completions start to N). GPU kernels need both as
    int32 tensors, with ``groups`` counted from the first completion. The positions of a prompt start at 0; those of a
    completion go on from the end of its prompt.
    """

    segments: list[int]
    groups: list[int]
    segments_on_device: torch.Tensor
    groups_on_device: torch.Tensor
    position_ids_1N: torch.Tensor


@dataclass
class Batch:
    """A micro-batch of B completions, T the longest, and the tokens that the model reads for them.

    Those tokens are R rows of N: one packed row as ``layout`` describes it, or, without a layout, B padded rows of a
    prompt and a completion each. ``predicts_BT`` is, for each token of a completion, the index among the R x N tokens
    of the one before it, which predicts it. ``mask_BT`` is 1.0 at tokens that count, else 0.0. ``old_logps_BT`` is None
    when on-policy (the current logprob, detached, is the old one); ``ref_logps_BT`` is None when ``beta`` is 0,
    ``kept_BT`` where no selection of tokens was made, ``log_left_BT`` without truncated sampling or old policy.
    """

    input_ids_RN: torch.Tensor
    layout: Layout | None
    completion_ids_BT: torch.Tensor
    predicts_BT: torch.Tensor
    completion_mask_BT: torch.Tensor  # bool: positions whose logprob is computed
    places_M: torch.Tensor  # those positions as indices into the B x T; an index of booleans makes the host wait
    mask_BT: torch.Tensor  # float: positions that count in the loss
    advantages_B: torch.Tensor
    sampler_logps_BT: torch.Tensor
    old_logps_BT: torch.Tensor | None = None
    ref_logps_BT: torch.Tensor | None = None
    kept_BT: torch.Tensor | None = None
    log_left_BT: torch.Tensor | None = None
