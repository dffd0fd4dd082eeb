"""A completion that is being sampled, and the conversation of an episode with what answers it: both backends' part."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from grpo.backends.base import Sampling, Turns
from grpo.errors import RunError
from grpo.types import VersionSpan


@dataclass(eq=False)
class SampledSequence:
    """Which completion of which request it is, the key of its draws, and its tokens so far.

    With an environment the tokens are an episode's: ``answered`` of them are the environment's, and the model's turn
    begins at ``start``. While the environment is asked, ``reply`` is what will be its answer. ``versions`` is for a
    backend whose weights may change meanwhile.
    """

    request: int
    sample: int
    key: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    start: int = 0
    answered: int = 0
    turns: int = 0  # that are over
    reply: Future[list[int] | None] | None = None
    asked_at: int = 0  # decoding step
    versions: list[VersionSpan] = field(default_factory=list)

    @property
    def drawn(self) -> int:
        """Tokens that the model drew."""
        return len(self.tokens) - self.answered

    def turn(self) -> list[int]:
        """The tokens of the model's turn."""
        return self.tokens[self.start :] if self.start else self.tokens

    def add(self, token: int, logprob: float) -> None:
        """Raises RunError where the token was drawn from nan."""
        if logprob != logprob:
            raise RunError("the model's logits are nan: its weights or the compute type's range are at fault")
        self.tokens.append(token)
        self.logprobs.append(logprob)


@dataclass(frozen=True)
class Conversation:
    """What is said to ``turns`` at the end of a sequence's turn, and what comes of its answer. ``turns`` is None
    without an environment."""

    sampling: Sampling
    turns: Turns | None

    def left(self, sequence: SampledSequence) -> int:
        """How many tokens the model may still draw in this turn."""
        left = self.sampling.max_completion_length - sequence.drawn
        if self.turns is None or self.turns.max_turn_length is None:
            return left
        return min(left, self.turns.max_turn_length - (len(sequence.tokens) - sequence.start))

    def ask(self, sequence: SampledSequence, step: int = 0) -> Future[list[int] | None]:
        """Tell the environment that a turn is over, ``step`` decoding steps after the first. Returns its ``reply``."""
        assert self.turns is not None
        place, ended = (sequence.request, sequence.sample), "stop" if sequence.stopped else "length"
        sequence.asked_at, last = step, self._used_up(sequence)
        sequence.reply = self.turns.answer(place, sequence.tokens, sequence.start, ended, last=last)
        return sequence.reply

    def receive(self, sequence: SampledSequence) -> bool:
        """Wait for the answer and add it. Returns whether the episode goes on.

        Raises:
            RunError: the environment's own; or the answer is longer than it said, or comes to an episode that is used
                up.
        """
        assert self.turns is not None
        assert sequence.reply is not None
        reply, sequence.reply = sequence.reply.result(), None
        sequence.turns += 1
        if reply is None:
            return False
        if self._used_up(sequence):
            raise RunError("the environment answered the last turn of an episode, which nothing can follow")
        sequence.tokens.extend(reply)
        sequence.logprobs.extend([0.0] * len(reply))
        sequence.answered += len(reply)
        sequence.start = len(sequence.tokens)
        if sequence.answered > self.turns.max_environment_tokens:
            raise RunError(
                f"the environment added {sequence.answered} tokens to an episode, and said that it adds "
                f"{self.turns.max_environment_tokens} at most (Turns.max_environment_tokens)"
            )
        return True

    def _used_up(self, sequence: SampledSequence) -> bool:
        return sequence.drawn == self.sampling.max_completion_length
