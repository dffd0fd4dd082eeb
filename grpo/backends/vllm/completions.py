"""What an engine is asked for a completion, and what comes of its answer: a completion, or one turn of an episode.

An episode is a request for each turn, with the whole history as the prompt: the engine's prefix cache has the keys and
values of what was there before. Tokens go in as they came out.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from grpo.backends.base import Request, Sampling
from grpo.backends.sequence import Conversation, SampledSequence
from grpo.backends.vllm.pool import Lost
from grpo.randomness import key as key_of
from grpo.types import VersionSpan

UNKNOWN = -9999.0  # what vLLM writes in place of a log-probability that is nan or -inf


def generate_payload(
    token_ids: list[int], key: int, sampling: Sampling, stop_token_ids: list[int], *, version: int, model: str | None
) -> dict[str, Any]:
    """The request for one completion, whose draws are seeded by its key alone.

    The salt keeps prompts from using cached keys and values of other weights. The trainer's own list says which ids
    end a completion; vLLM's end-of-sequence token is ignored.
    """
    return {
        "token_ids": token_ids,
        "cache_salt": f"v{version}",
        "sampling_params": {
            "max_tokens": sampling.max_completion_length,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or 0.0,
            "seed": key >> 1,  # vLLM's seeds are signed
            "logprobs": 0,
            "ignore_eos": True,
            "stop_token_ids": stop_token_ids,
            "stop": sampling.stop,
            "include_stop_str_in_output": True,
            "detokenize": bool(sampling.stop),
            "skip_special_tokens": False,
        },
    } | ({"model": model} if model else {})


def logprobs_of(answer: dict[str, Any]) -> list[float]:
    """The log-probabilities of a completion's tokens; nan where the engine could not compute one. vLLM sends -9999 in
    place of nan and -inf, other writers of JSON a null."""
    said = [entry["logprob"] for entry in answer["logprobs"]["content"]]
    return [math.nan if logprob is None or logprob <= UNKNOWN else logprob for logprob in said]


def adapter_name(version: int) -> str:
    return f"grpo-{version}"


def version_of(adapter: str) -> int:
    return int(adapter.removeprefix("grpo-"))


def spans_of(answer: dict[str, Any], *, adapters: bool) -> list[VersionSpan]:
    """Which policy version sampled which of an answer's tokens. With adapters the engine's label is that of the frozen
    weights, and its adapter is named by version."""
    if adapters:
        return [VersionSpan(0, len(answer["token_ids"]), version_of(answer["model"]))]
    return [VersionSpan(s["start"], s["end"], int(s["version"])) for s in answer["weight_versions"]]


@dataclass(frozen=True)
class TurnByTurn:
    """Plays episodes of ``requests``, in the pool's thread. ``payload`` makes a request of a prompt's token ids, a key
    and a sampling; ``ask`` has a server answer it."""

    requests: list[Request]
    conversation: Conversation
    payload: Callable[[list[int], int, Sampling], dict[str, Any]]
    ask: Callable[[dict[str, Any]], Awaitable[dict[str, Any] | Lost]]
    adapters: bool

    def beginnings(self) -> list[SampledSequence]:
        """An episode for each key, of which nothing was drawn yet."""
        return [
            SampledSequence(r, g, key) for r, wanted in enumerate(self.requests) for g, key in enumerate(wanted.keys)
        ]

    async def play(self, sequence: SampledSequence) -> SampledSequence | Lost:
        """An episode from where it is to its end. Where no server is left it stays at the beginning of a turn, from
        which another call goes on.

        Raises:
            RunError: the environment's own.
        """
        while True:
            answer = await self.ask(self._payload(sequence))
            if isinstance(answer, Lost):
                return answer
            self._take(sequence, answer)
            await asyncio.wrap_future(self.conversation.ask(sequence))
            if not self.conversation.receive(sequence):
                return sequence
            sequence.versions[-1] = replace(sequence.versions[-1], end=len(sequence.tokens))  # with the answer

    def _payload(self, sequence: SampledSequence) -> dict[str, Any]:
        """The request for a turn. Its draws are seeded by the completion's key and the turn's number."""
        sampling, turns = self.conversation.sampling, self.conversation.turns
        assert turns is not None
        of_turn = replace(
            sampling, max_completion_length=self.conversation.left(sequence), stop=[*sampling.stop, *turns.stop]
        )
        prompt_ids = self.requests[sequence.request].prompt.token_ids
        return self.payload([*prompt_ids, *sequence.tokens], key_of(sequence.key, sequence.turns), of_turn)

    def _take(self, sequence: SampledSequence, answer: dict[str, Any]) -> None:
        """Add a turn's tokens, with their log-probabilities by the weights that drew them."""
        before, versions = len(sequence.tokens), sequence.versions
        sequence.tokens += answer["token_ids"]
        sequence.logprobs += logprobs_of(answer)
        sequence.stopped = answer["finish_reason"] == "stop"
        for span in spans_of(answer, adapters=self.adapters):
            moved = VersionSpan(before + span.start, before + span.end, span.version)
            if versions and versions[-1].version == moved.version:
                versions[-1] = replace(versions[-1], end=moved.end)
            else:
                versions.append(moved)
