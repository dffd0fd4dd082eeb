"""Prompt templates: how a question becomes the text that the model continues.

A template returns ``(text, prefill)``. ``prefill`` is the tail of ``text`` that already belongs to the answer (a
``<think>``); a verifier that checks the format puts it before the completion. It is empty if the model begins its
answer itself.
"""

from __future__ import annotations

from typing import Any

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

PLAIN_TEMPLATES = {"none": ("{question}", ""), "r1_zero": (R1_ZERO, ""), "tinyzero": (TINYZERO, "<think>")}


def plain(name: str, question: str) -> tuple[str, str]:
    """``none``, ``r1_zero`` or ``tinyzero``: ``(text, prefill)`` of a question."""
    template, prefill = PLAIN_TEMPLATES[name]
    return template.replace("{question}", question), prefill


def chat(
    prompt: str | list[Message], tokenizer: Any, system_prompt: str | None = None, **kwargs: Any
) -> tuple[str, str]:
    """The tokenizer's own chat template: ``(text, prefill)``. ``kwargs`` go to ``apply_chat_template``.

    A string becomes the one message of the user. Messages that end with the assistant's are continued: what it has
    said is the prefill. So is a ``<think>`` with which the template itself opens the answer. Raises ValueError where
    the conversation has a system message and ``system_prompt`` is given too, or the template refuses the messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None:
        if messages[0]["role"] == "system":
            raise ValueError("the prompt has a system message of its own: remove it, or data.system_prompt")
        messages.insert(0, {"role": "system", "content": system_prompt})
    continued = messages[-1]["role"] == "assistant"
    mode = {"continue_final_message": True} if continued else {"add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **mode, **kwargs)
    except Exception as error:  # a template is a program of its own: whatever it raises, the row is what to name
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    if not continued:
        return text, text[text.rindex("<think>") :] if text.rstrip().endswith("<think>") else ""
    opened = messages[-1]["content"].strip()
    if opened not in text:
        raise ValueError("the chat template does not show the begun answer (the last message is the assistant's)")
    return text, text[text.rindex(opened) :]
