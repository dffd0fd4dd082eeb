"""A completion of several messages to imitate: the model's, and between them what tools or an environment said.

    [{"role": "assistant", "content": "<tool_call> … </tool_call>"}, {"role": "tool", "content": "378"},
     {"role": "assistant", "content": "<answer> 378 </answer>"}]

The model reads all of it and learns its own messages alone, as in an episode: each is tokenized by itself and ends as
the model ends it, and what stands between belongs to the environment. With ``template: chat`` that is whatever the
tokenizer's template writes between two messages of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from grpo.config import RowsConfig
from grpo.prompts import templates
from grpo.prompts.answers import PLAIN, STOPS, WRAPPED, encode_behind
from grpo.prompts.templates import Message


class Piece(NamedTuple):
    """A part of a completion: its text, whether the model wrote it, and whether EOS stands behind it."""

    text: str
    own: bool
    eos: bool


def pieces(
    data: RowsConfig, question: str | list[Message], completion: Sequence[Message], tokenizer: Any
) -> list[Piece]:
    """The parts of a completion in their order; the model's and the others' take turns, the model's are first and last.

    Raises ValueError where the messages are in another order, or the chat template refuses them or shows earlier ones
    otherwise once others follow; TemplateHangs where it does not end.
    """
    own = [message["role"] == "assistant" for message in completion]
    if not own[0] or not own[-1]:
        raise ValueError("a completion of several messages begins and ends with the assistant's")
    if any(one and other for one, other in pairwise(own)):
        raise ValueError("a completion has two messages of the assistant in a row: join them")
    if data.template == "chat" or not isinstance(question, str):
        return _by_chat_template(data, question, completion, tokenizer)
    found: list[Piece] = []
    form = "hermes"
    for message in completion:
        said = message["content"]
        if message["role"] == "assistant":
            said = said.removesuffix(tokenizer.eos_token)
            closed = [form for form, stops in STOPS.items() if said.endswith(stops)]
            form = closed[0] if closed else "hermes"
            found.append(Piece(said, True, eos=message is completion[-1] or not closed))
            continue
        text = WRAPPED[form].format(said) if message["role"] == "tool" else said
        if found[-1].own:
            found.append(Piece(PLAIN.format(text), own=False, eos=False))
        else:  # another answer to the same turn
            found[-1] = found[-1]._replace(text=f"{found[-1].text}{text}\n")
    return found


def _by_chat_template(
    data: RowsConfig, question: str | list[Message], completion: Sequence[Message], tokenizer: Any
) -> list[Piece]:
    """As ``pieces``: what the template adds to the text with each message of the model, and between them."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    shown, _ = templates.of_question(data, question, tokenizer)
    if data.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    found: list[Piece] = []
    for place, message in enumerate(completion):
        own = message["role"] == "assistant"
        messages.append(message)
        if not own and completion[place + 1]["role"] != "assistant":
            continue  # several others in a row are one part
        added = _added(data, shown, messages, tokenizer, not own)
        shown += added
        if own:  # the token that ends it is the model's; what the template writes behind it is not
            text, ended, behind = added.partition(tokenizer.eos_token)
            last = place + 1 == len(completion)
            found.append(Piece(text if ended else text.rstrip(), own=True, eos=bool(ended) or last))
        else:
            found.append(Piece(behind + added, own=False, eos=False))
    return found


def _added(data: RowsConfig, shown: str, messages: list[Message], tokenizer: Any, answered: bool) -> str:
    """What the template shows of the messages behind ``shown``; where they are ``answered``, up to the answer."""
    try:
        text = templates.render(
            messages, tokenizer, data.chat_template_date, add_generation_prompt=answered, **data.chat_template_kwargs
        )
    except templates.TemplateHangs:
        raise
    except Exception as error:  # a template is a program of its own
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    if not text.startswith(shown):
        raise ValueError(
            "the chat template shows earlier messages otherwise once others follow (many drop earlier thinking), so no "
            "episode would look like this row: train on one message a row, or give data.chat_template_kwargs or a "
            "tokenizer whose template keeps them"
        )
    return text[len(shown) :]


def tokens(found: Sequence[Piece], tokenizer: Any) -> tuple[list[int], tuple[int, ...]]:
    """Token ids of a completion's parts; and the places of those that are not the model's."""
    ids: list[int] = []
    others: list[int] = []
    for piece in found:
        start = len(ids)
        own = piece.own
        ids += tokenizer.encode(piece.text, add_special_tokens=False) if own else encode_behind(tokenizer, piece.text)
        if piece.eos:
            ids.append(tokenizer.eos_token_id)
        if not piece.own:
            others += range(start, len(ids))
    return ids, tuple(others)
