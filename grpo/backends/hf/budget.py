"""How the cache's memory is divided between prompts and sequences."""

from __future__ import annotations

from dataclasses import dataclass

from grpo.backends.base import Request
from grpo.backends.hf.kv_cache import Shape, head_tokens
from grpo.errors import UserError

SHORTEST_SEQUENCE = 64  # tokens; sequences do not start with less room than this where memory is short


@dataclass(frozen=True)
class Budget:
    """What a rollout wants, within the ``tokens`` that prompts and sequences may hold together."""

    tokens: int
    prompts: int
    prompt_tokens: int
    sequences: int  # wanted at once; fewer run where memory is short
    sequence_tokens: int  # of one at its longest
    group_size: int

    @classmethod
    def of(
        cls, requests: list[Request], longest_completion: int, max_sequences: int, tokens: int, *, prompt_step: int = 1
    ) -> Budget:
        """``longest_completion`` includes what an environment may add. Prompts get room for a multiple of
        ``prompt_step`` tokens.

        Raises UserError where ``tokens`` do not hold one prompt and one sequence.
        """
        prompt_tokens = max((len(r.prompt.token_ids) for r in requests), default=0)
        prompt_tokens = -(-prompt_tokens // prompt_step) * prompt_step
        G = max((len(r.keys) for r in requests), default=1)
        sequences = min(max_sequences, sum(len(r.keys) for r in requests))
        # Sequences end in no order, so a prompt may stay for one sequence: room for twice the prompts that start.
        prompts = min(len(requests), 2 * -(-sequences // G) + 1)
        sequence_tokens = head_tokens(prompt_tokens) + longest_completion
        for_prompts = min(max(tokens // 2, tokens - sequences * sequence_tokens), tokens - sequence_tokens)
        while prompts > 1 and prompts * prompt_tokens > for_prompts:
            prompts -= 1
        if requests and prompts * prompt_tokens + sequence_tokens > tokens:
            raise UserError(
                f"rollout.kv_cache_gb holds {tokens} tokens, not a prompt of {prompt_tokens} and a completion of "
                f"{longest_completion}; raise it, or lower rollout.max_completion_length (with an environment also its "
                "max_turns and max_observation_length, which the completion's length includes)"
            )
        return cls(tokens, prompts, prompt_tokens, sequences, sequence_tokens, G)

    def shape(self, sequence_tokens: int) -> Shape:
        """With room for ``sequence_tokens`` a sequence, as many sequences as fit."""
        fit = (self.tokens - self.prompts * self.prompt_tokens) // sequence_tokens
        return Shape(self.prompts, self.prompt_tokens, min(self.sequences, fit), sequence_tokens, self.group_size)

    def first_shape(self) -> Shape:
        """All sequences at full length where that fits, else with less room each, so that more of them run at once."""
        shape = self.shape(self.sequence_tokens)
        while shape.sequences < self.sequences and shape.sequence_tokens > SHORTEST_SEQUENCE:
            shape = self.shape(-(-shape.sequence_tokens // 2))
        return shape

    def longer(self, shape: Shape) -> Shape:
        return self.shape(min(2 * shape.sequence_tokens, self.sequence_tokens))

    def shorter(self, shape: Shape) -> Shape:
        """Half the room for each sequence, where that lets more of them run."""
        half = self.shape(max(-(-shape.sequence_tokens // 2), min(SHORTEST_SEQUENCE, self.sequence_tokens)))
        return half if half.sequences > shape.sequences else shape
