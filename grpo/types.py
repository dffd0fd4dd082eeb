"""What flows through a step, and the legend of dimension suffixes.

Tensor and array names end in the dimensions they have, in order:

    P  prompts in a step            B  sequences in a micro-batch     V  vocabulary
    G  completions a prompt         T  tokens of a completion         H  hidden size
    R  rows the model reads         N  tokens of a row                L  layers with experts
    E  experts of a layer           K  experts that a token goes to, or a teacher's likeliest tokens
    U  turns of an episode

``rewards_PG`` is prompts by completions; ``logps_BT`` is sequences by tokens of their completions: position ``t``
describes the completion's token ``t`` itself (its logprob given its prompt and the tokens before it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

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
    ERROR = "error"  # the backend, or its environment, gave up on it; it has no reward
    ENVIRONMENT = "environment"  # the environment ended the episode
    TURNS = "turns"  # environment.max_turns was reached first


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


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote, and what came of it. ``error`` is its kind, empty where the tool returned."""

    name: str
    arguments: str
    result: str
    error: str = ""


@dataclass(frozen=True)
class Turn:
    """One turn of the model: tokens ``[start, end)`` of the completion are its own.

    All tokens of an episode that are in no turn are the environment's: those before the first turn, and those between
    the end of a turn and the start of the next. ``ended`` says why the turn ended: ``stop`` (a token or string that
    ends turns), ``tool_call``, ``length`` (``environment.max_turn_length``, or what was left of the episode's).
    ``reward`` is what the environment paid for this turn alone; None where it pays by the episode. ``text`` is what the
    model wrote, special tokens removed; ``observation`` what the environment said to it, before the chat template,
    where that is no result of ``calls``. ``cut``: of what was said to it, the model has read a part, up to
    ``environment.max_observation_length``.
    """

    start: int
    end: int
    ended: str
    reward: float | None = None
    calls: tuple[ToolCall, ...] = ()
    text: str = ""
    observation: str = ""
    cut: bool = False


@dataclass
class Episode:
    """What an environment made of a completion. ``reward`` is what it paid in the end (what it paid for turns comes on
    top), None where it pays nothing or failed. ``failure`` is the cause of a failure (``timeout``, ``crashed``,
    ``memory``, ``error``), ``message`` its words. ``opening`` is the text of the environment's tokens before the first
    turn."""

    turns: list[Turn]
    reward: float | None = None
    failure: str = ""
    message: str = ""
    opening: str = ""

    def returns(self) -> list[float]:
        """What each turn led to: the rewards of the turns from it on, and the last one's, together."""
        backwards = [self.reward or 0.0, *(turn.reward or 0.0 for turn in reversed(self.turns))]
        return list(accumulate(backwards))[1:][::-1]

    def total_reward(self) -> float | None:
        """All that it paid; None where it failed, or pays neither for the whole nor for a turn."""
        if self.failure or all(paid is None for paid in (self.reward, *(turn.reward for turn in self.turns))):
            return None
        return self.returns()[0] if self.turns else self.reward


@dataclass
class Completion:
    """One sampled answer: its tokens (a final end-of-sequence token included) and how they came about.

    ``sampler_logprobs[i]`` is the log-probability of ``token_ids[i]`` under the distribution it was actually drawn
    from: after temperature and after top-k/top-p/min-p truncation (renormalized); nan where an engine could not say.
    ``text`` has special tokens removed. With an environment it is what the model wrote, turn after turn, and
    ``episode`` says which tokens are its own; the environment's have a log-probability of 0.0 that nothing reads.
    Both sequences are the backend's lists, or arrays of numbers where the completion has come from another process.
    """

    token_ids: Sequence[int]
    sampler_logprobs: Sequence[float]
    status: Status
    text: str
    versions: list[VersionSpan]
    episode: Episode | None = None

    @property
    def num_model_tokens(self) -> int:
        """Tokens that the model wrote."""
        if self.episode is None:
            return len(self.token_ids)
        return sum(turn.end - turn.start for turn in self.episode.turns)

    def model_token_ids(self) -> list[int]:
        """The tokens that the model wrote, one turn behind the other."""
        if self.episode is None:
            return list(self.token_ids)
        return [token for turn in self.episode.turns for token in self.token_ids[turn.start : turn.end]]

    def environment_places(self) -> tuple[int, ...]:
        """Places of the tokens that the environment wrote, ascending."""
        if self.episode is None:
            return ()
        own = {place for turn in self.episode.turns for place in range(turn.start, turn.end)}
        return tuple(place for place in range(len(self.token_ids)) if place not in own)


@dataclass(frozen=True)
class TeacherSays:
    """What a teacher that is not in the process says of a completion, token by token: the log-probability of the token
    itself, or (where ``top_ids`` is not None) its likeliest tokens with theirs, never none, not always as many."""

    logprobs: Sequence[float] = ()
    top_ids: Sequence[Sequence[int]] | None = None
    top_logprobs: Sequence[Sequence[float]] | None = None

    def first(self) -> TeacherSays:
        """Of the first token alone."""
        if self.top_ids is None or self.top_logprobs is None:
            return TeacherSays(self.logprobs[:1])
        return TeacherSays((), self.top_ids[:1], self.top_logprobs[:1])


class Example(NamedTuple):
    """A supervised example: token ids of a prompt and of the completion to imitate, the latter with its EOS.

    ``environment`` are the places of tokens in the completion that the model reads and does not imitate: what tools or
    an environment said between its messages."""

    prompt: list[int]
    completion: list[int]
    teacher: TeacherSays | None = None
    environment: tuple[int, ...] = ()

    @property
    def num_model_tokens(self) -> int:
        """Tokens to imitate."""
        return len(self.completion) - len(self.environment)


@dataclass
class Group:
    """A prompt with its G completions and, after scoring, their rewards.

    ``rewards[g]`` is the weighted sum over reward functions, or None where no function could score the completion.
    ``rewards_by_function[name][g]`` are the parts; ``verdicts[name]`` counts the reasons that the function gave, and
    ``said[name][g]`` is the reason for one completion (``scored`` or ``unscored`` of a function that gives none).
    ``extra_metrics`` holds what functions logged, as ``rewards/NAME/logged/METRIC``.
    ``replayed``: an earlier step's policy sampled it, so the update needs a ratio to that policy.
    ``teacher`` is what a teacher on a server says of each completion.
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
    teacher: list[TeacherSays] | None = None


@dataclass
class TrainedSequence:
    """One prompt+completion as the update sees it: what ``packing`` arranges into micro-batches.

    ``advantage`` is one number, or one for each token (``algorithm.credit: turn``). ``weight`` is 0 for padding
    sequences that only keep processes in step with each other, else 1. What is said of each token is 0 at those of
    ``environment``, and nothing reads it.
    """

    prompt_ids: list[int]
    completion_ids: Sequence[int]
    sampler_logprobs: Sequence[float]
    advantage: float | list[float]
    valid: bool = True  # False: left out of loss and denominators (truncated and masked, or unscorable)
    old_logprobs: Sequence[float] | None = None
    ref_logprobs: list[float] | None = None
    kept: list[float] | None = None  # 0 at tokens that a selection excludes, else 1; None without one
    log_left: list[float] | None = None  # log of what truncation leaves of the old policy's probability
    teacher: TeacherSays | None = None
    weight: float = 1.0
    uncounted: tuple[int, ...] = ()  # places of tokens that do not count: the sampler gave no log-probability
    environment: tuple[int, ...] = ()  # places of the environment's tokens: the model reads them, and nothing else

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def num_model_tokens(self) -> int:
        return len(self.completion_ids) - len(self.environment)

    def model_places(self) -> Sequence[int]:
        """Places of the completion's tokens that the model wrote, ascending."""
        every = range(len(self.completion_ids))
        if not self.environment:
            return every
        environment = set(self.environment)
        return [place for place in every if place not in environment]

    def counted_places(self) -> list[int]:
        """Those of them that count."""
        uncounted = set(self.uncounted)
        return [place for place in self.model_places() if place not in uncounted]

    @property
    def has_advantage(self) -> bool:
        """Is an advantage of it other than 0?"""
        return any(self.advantage) if isinstance(self.advantage, list) else self.advantage != 0


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
    of the one before it, which predicts it. ``mask_BT`` is 1.0 at tokens that count, else 0.0. ``advantages`` is (B,1),
    or (B,T) where the turns of an episode have their own; it broadcasts. ``old_logps_BT`` is None
    when on-policy (the current logprob, detached, is the old one); ``ref_logps_BT`` is None when ``beta`` is 0,
    ``kept_BT`` where no selection of tokens was made, ``log_left_BT`` without truncated sampling or old policy. What a
    teacher elsewhere says is in the last three: of the completion's tokens, or its K likeliest, -1 at empty places.
    """

    input_ids_RN: torch.Tensor
    layout: Layout | None
    completion_ids_BT: torch.Tensor
    predicts_BT: torch.Tensor
    completion_mask_BT: torch.Tensor  # bool: positions whose logprob is computed; of an episode the model's
    places_M: torch.Tensor  # those positions as indices into the B x T; an index of booleans makes the host wait
    mask_BT: torch.Tensor  # float: positions that count in the loss
    advantages: torch.Tensor
    sampler_logps_BT: torch.Tensor
    old_logps_BT: torch.Tensor | None = None
    ref_logps_BT: torch.Tensor | None = None
    kept_BT: torch.Tensor | None = None
    log_left_BT: torch.Tensor | None = None
    teacher_logps_BT: torch.Tensor | None = None
    teacher_ids_BTK: torch.Tensor | None = None
    teacher_top_BTK: torch.Tensor | None = None


@dataclass(frozen=True)
class Routed:
    """What one layer's router did with N tokens: its logits for E experts, with gradient, and the K that each token
    went to. ``sigmoid``: its scores are sigmoids of the logits (DeepSeek-V3), else a softmax."""

    logits_NE: torch.Tensor
    chosen_NK: torch.Tensor
    sigmoid: bool

    def probabilities(self) -> torch.Tensor:
        """The scores, normalized over experts, (N,E) float32."""
        logits_NE = self.logits_NE.float()
        if not self.sigmoid:
            return logits_NE.softmax(-1)
        scores_NE = logits_NE.sigmoid()
        return scores_NE / scores_NE.sum(-1, keepdim=True)
