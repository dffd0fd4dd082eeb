"""Prompt templates: what becomes of a question, and which part of it is the answer's."""

from __future__ import annotations

import pytest

from grpo.prompts import templates
from tests.prompts.small_rows import CHAT, make_tokenizer


def test_plain_templates():
    assert templates.plain("none", "a ?") == ("a ?", "")
    text, prefill = templates.plain("r1_zero", "What is {x}?")
    assert text.startswith("A conversation between User and Assistant. The user asks a question,")
    assert text.endswith("<answer> answer here </answer>. User: What is {x}? Assistant:")
    assert prefill == ""
    text, prefill = templates.plain("tinyzero", "a ?")
    assert text.endswith("\nUser: a ?\nAssistant: Let me solve this step by step.\n<think>")
    assert prefill == "<think>"


def test_the_chat_template():
    tokenizer = make_tokenizer(chat=CHAT)
    assert templates.chat("hi", tokenizer) == ("<|start|>user : hi<|end|><|start|>assistant :", "")
    text, _ = templates.chat("hi", tokenizer, system_prompt="be brief")
    assert text.startswith("<|start|>system : be brief<|end|><|start|>user : hi")
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well, "}]
    text, prefill = templates.chat(begun, tokenizer)
    assert text.endswith(("<|start|>assistant : well,", "<|start|>assistant : well, "))
    assert text.endswith(prefill)
    assert prefill.strip() == "well,"
    opened = make_tokenizer(chat=CHAT.replace("assistant :", "assistant :<think>\n"))
    assert templates.chat("hi", opened)[1] == "<think>\n"
    own = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="a system message of its own"):
        templates.chat(own, tokenizer, system_prompt="be brief")
