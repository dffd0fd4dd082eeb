"""Prompt templates: how a question becomes the text that the model continues.

A template returns ``(text, prefill)``. ``prefill`` is the tail of ``text`` that already belongs to the answer (a
``<think>``); a verifier that checks the format puts it before the completion. It is empty if the model begins its
answer itself.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import psutil

from grpo.config import RowsConfig
from grpo.errors import UserError

Message = dict[str, str]

# DeepSeek-R1-Zero (arXiv:2501.12948, table 1). Nothing is prefilled: the model has to open <think> by itself. The
# paper puts a full stop behind the question; here a question brings its own.
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {question} Assistant:"
)

# TinyZero's template for base models; its questions say themselves which tags to use (``data.countdown``).
TINYZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: {question}\n"
    "Assistant: Let me solve this step by step.\n<think>"
)

DATE = "2025-01-01"  # default of ``data.chat_template_date``
SECONDS = 10.0  # in which a template ends that ends at all: mostly it takes a millisecond
GIGABYTES = 2.0  # by which the process may grow meanwhile: a text that a loop doubles fills any memory
LOOK = 0.1  # seconds between looks at both

PLAIN_TEMPLATES = {"none": ("{question}", ""), "r1_zero": (R1_ZERO, ""), "tinyzero": (TINYZERO, "<think>")}


def of_question(
    data: RowsConfig, question: str | list[Message], tokenizer: Any, tools: Sequence[dict[str, Any]] = ()
) -> tuple[str, str]:
    """The text that the model sees for a question by ``data.template``, and the tail of it that counts as answer. A
    chat template shows the ``tools`` that the model may call, JSON schemas.

    Raises ValueError and TemplateHangs, as ``chat`` does.
    """
    if data.template != "chat" and isinstance(question, str):
        return plain(data.template, question)
    kwargs = data.chat_template_kwargs | ({"tools": list(tools)} if tools else {})
    return chat(question, tokenizer, data.system_prompt, data.chat_template_date, **kwargs)


def encode(data: RowsConfig, text: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt: with BOS once if the tokenizer adds one, and without the EOS that some add.

    A chat template writes its special tokens itself, and a row may; then none is added.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if data.template == "chat" or (bos and text.startswith(bos)):
        return tokenizer.encode(text, add_special_tokens=False)
    token_ids = tokenizer.encode(text)
    if eos and not text.endswith(eos) and token_ids[-1:] == [tokenizer.eos_token_id]:
        token_ids.pop()
    return token_ids


def plain(name: str, question: str) -> tuple[str, str]:
    """``none``, ``r1_zero`` or ``tinyzero``: ``(text, prefill)`` of a question."""
    template, prefill = PLAIN_TEMPLATES[name]
    return template.replace("{question}", question), prefill


class TemplateHangs(UserError):
    """A chat template did not end. It is a program, and may loop for ever."""


def chat(
    prompt: str | list[Message],
    tokenizer: Any,
    system_prompt: str | None = None,
    date: str = DATE,
    **kwargs: Any,
) -> tuple[str, str]:
    """The tokenizer's own chat template: ``(text, prefill)``. ``kwargs`` go to ``apply_chat_template``, and where the
    template asks for the time it is told ``date``.

    A string becomes the one message of the user. Messages that end with the assistant's are continued: what it has
    said is the prefill. So is a ``<think>`` with which the template itself opens the answer. Raises ValueError where
    the conversation has a system message and ``system_prompt`` is given too, or the template refuses the messages, and
    TemplateHangs where it does not end.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None:
        if messages[0]["role"] == "system":
            raise ValueError("the prompt has a system message of its own: remove it, or data.system_prompt")
        messages.insert(0, {"role": "system", "content": system_prompt})
    continued = messages[-1]["role"] == "assistant"
    mode = {"continue_final_message": True} if continued else {"add_generation_prompt": True}
    try:
        text = render(messages, tokenizer, date, **mode, **kwargs)
    except TemplateHangs:
        raise
    except Exception as error:  # a template is a program of its own: whatever it raises, the row is what to name
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    if not continued:
        return text, text[text.rindex("<think>") :] if text.rstrip().endswith("<think>") else ""
    opened = messages[-1]["content"].strip()
    if opened not in text:
        raise ValueError("the chat template does not show the begun answer (the last message is the assistant's)")
    return text, text[text.rindex(opened) :]


def render(
    messages: list[Message],
    tokenizer: Any,
    date: str = DATE,
    *,
    asked: Callable[[str], Any] = lambda _: None,
    **kwargs: Any,
) -> str:
    """What the chat template makes of messages, at a time that stands still: a resumed run has the same prompts.

    ``asked`` is called with the format in which the template asks for the time. Raises TemplateHangs, and whatever the
    template raises.
    """
    now = datetime.fromisoformat(date)

    def strftime_now(form: str) -> str:
        asked(form)
        return now.strftime(form)

    with _ends_in_time():
        return tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=strftime_now, **kwargs)


@contextmanager
def _ends_in_time() -> Iterator[None]:
    """Raises TemplateHangs within it after ``SECONDS``, or where the process grows by ``GIGABYTES``. Only the main
    thread can be interrupted; others are not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    process, begun = psutil.Process(), time.monotonic()
    size = process.memory_info().rss

    def look(*_: object) -> None:
        if time.monotonic() - begun > SECONDS:
            raise TemplateHangs(f"the tokenizer's chat template does not end (given up after {SECONDS:g} s)")
        if process.memory_info().rss - size > GIGABYTES * 1e9:
            raise TemplateHangs(f"the tokenizer's chat template makes a text of more than {GIGABYTES:g} GB")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
