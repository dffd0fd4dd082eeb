"""Episodes without a model: a backend whose model says what a test wrote, and tokenizers that tests make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.backends.base import Request, Sampling, Turns
from grpo.types import Completion, Prompt, Status, VersionSpan

Script = Callable[[Request, int, int, str], str]
"""What the model says: from the request, the sample, the number of the turn and the text of all tokens so far."""

SPECIAL = ["<eos>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]


def bytes_tokenizer(template: str | None = None, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A token a byte, and the special tokens of Qwen's and Llama's templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=None, pad_token="<eos>")
    made.chat_template = template
    return made


@dataclass
class ScriptedBackend:
    """Draws the tokens of a script. Turns end with ``eos``, at a stop string, or at a limit; an answer is waited for
    only once all episodes have taken their turns."""

    tokenizer: Any
    script: Script
    eos: str = "<|im_end|>"
    answers: list[tuple[Any, ...]] = field(default_factory=list)

    def generate(
        self, requests: Any, sampling: Sampling, version: int, on_group: Any = None, turns: Turns | None = None
    ) -> list[list[Completion]]:
        assert turns is not None
        self.rows = {(r, s): _Row([], 0) for r, request in enumerate(requests) for s in range(len(request.keys))}
        living = list(self.rows)
        while living:
            asked = [(place, self._turn(requests[place[0]], place, sampling, turns)) for place in living]
            living = []
            for place, reply in asked:
                tokens = reply.result(30)
                self.answers.append((place, tokens))
                if tokens is not None:
                    self.rows[place].tokens += tokens
                    living.append(place)
        groups = [
            [self._completion(self.rows[r, s], version) for s in range(len(request.keys))]
            for r, request in enumerate(requests)
        ]
        for place, group in enumerate(groups):
            if on_group is not None:
                on_group(place, group)
        return groups

    def _turn(self, request: Request, place: tuple[int, int], sampling: Sampling, turns: Turns) -> Any:
        row = self.rows[place]
        so_far = self.tokenizer.decode([*request.prompt.token_ids, *row.tokens])
        text, ended = self.script(request, place[1], row.turns, so_far), "stop"
        at = [text.index(stop) + len(stop) for stop in turns.stop if stop in text]
        if at:
            text = text[: min(at)]
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if not at:
            ids.append(self.tokenizer.convert_tokens_to_ids(self.eos))
        room = sampling.max_completion_length - row.drawn
        limit = min(room, turns.max_turn_length or room)
        if len(ids) > limit:
            ids, ended = ids[:limit], "length"
        start = len(row.tokens)
        row.tokens += ids
        row.drawn += len(ids)
        row.turns += 1
        return turns.answer(place, row.tokens, start, ended, last=row.drawn >= sampling.max_completion_length)

    def _completion(self, row: _Row, version: int) -> Completion:
        n = len(row.tokens)
        return Completion(row.tokens, [-1.0] * n, Status.STOP, "of the backend", [VersionSpan(0, n, version)])


@dataclass
class _Row:
    tokens: list[int]
    drawn: int
    turns: int = 0


def says(*turns: str) -> Script:
    """The same turns in every episode."""
    return lambda request, sample, turn, so_far: turns[min(turn, len(turns) - 1)]


def by_sample(*scripts: Sequence[str]) -> Script:
    """Turns for each sample of a group."""
    return lambda request, sample, turn, so_far: scripts[sample][min(turn, len(scripts[sample]) - 1)]


def calls(name: str, **arguments: Any) -> str:
    """A call as Qwen writes it."""
    import json

    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def request(tokenizer: Any, text: str = "ask", keys: Sequence[int] = (1,), **columns: Any) -> Request:
    return Request(Prompt(0, text, text, tokenizer.encode(text), columns=columns), list(keys))
