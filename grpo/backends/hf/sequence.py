"""A completion that is being sampled, and when it, or a turn of it, is over."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from grpo.backends.base import Sampling, Turns
from grpo.errors import RunError


@dataclass(eq=False)
class SampledSequence:
    """Which completion of which request it is, the key of its draws, and its tokens so far.

    With an environment the tokens are an episode's: ``answered`` of them are the environment's, and the model's turn
    begins at ``start``. While the environment is asked, ``reply`` is what will be its answer.
    """

    request: int
    sample: int
    key: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    start: int = 0
    answered: int = 0
    reply: Future[list[int] | None] | None = None
    asked_at: int = 0  # decoding step

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
class Ends:
    """When sequences end. ``ended(key, tokens)`` says whether a completion, or a turn of it, is over with its last
    token; limits are counted here. ``turns`` is what answers between turns; None without."""

    sampling: Sampling
    ended: Callable[[int, list[int]], bool]
    turns: Turns | None = None

    def over(self, sequence: SampledSequence) -> bool:
        """Whether a sequence, or its turn, is over. Sets ``stopped``: not by a limit."""
        turn = sequence.turn()
        sequence.stopped = self.ended(sequence.key, turn)
        return (
            sequence.stopped
            or self._used_up(sequence)
            or (self.turns is not None and len(turn) == self.turns.max_turn_length)
        )

    def ask(self, sequence: SampledSequence, step: int = 0) -> None:
        """Tell the environment that a turn is over. ``step``: how many decoding steps were made by then."""
        assert self.turns is not None
        place, ended = (sequence.request, sequence.sample), "stop" if sequence.stopped else "length"
        last = self._used_up(sequence)
        sequence.reply = self.turns.answer(place, sequence.tokens, sequence.start, ended, last=last)
        sequence.asked_at = step

    def receive(self, sequence: SampledSequence) -> bool:
        """Wait for the environment's answer and add it. Returns whether the episode goes on.

        Raises:
            RunError: the answer is longer than the environment said, or comes to an episode that is used up.
        """
        assert self.turns is not None
        assert sequence.reply is not None
        reply, sequence.reply = sequence.reply.result(), None
        if reply is None:
            return False
        if self._used_up(sequence):
            raise RunError("the environment answered the last turn of an episode, which nothing can follow")
        sequence.tokens.extend(reply)
        sequence.answered += len(reply)
        if sequence.answered > self.turns.max_environment_tokens:
            raise RunError(
                f"the environment added {sequence.answered} tokens to an episode, and said that it adds "
                f"{self.turns.max_environment_tokens} at most (Turns.max_environment_tokens)"
            )
        sequence.logprobs.extend([0.0] * len(reply))
        sequence.start = len(sequence.tokens)
        return True

    def _used_up(self, sequence: SampledSequence) -> bool:
        return sequence.drawn == self.sampling.max_completion_length
