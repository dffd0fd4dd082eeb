"""Tags that the tokenizer holds as special tokens reach the reward, and are told to a person."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from grpo.backends.base import Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.backends.sequence import SampledSequence
from grpo.backends.vllm.backend import InFlight, VLLMBackend
from grpo.prompts.completion_text import TAGS, CompletionText
from rewards.countdown import countdown_reward
from rewards.format import format_reward
from tests.conftest import make_policy
from tests.prompts.small_rows import CHAT, make_tokenizer
from tests.prompts.test_checks import checked

PERFECT = "<think> a b </think> <answer> 1 </answer>"


def tokenizer_with_tags(*tags: str, chat: str | None = CHAT, eos: str = "<eos>"):
    tokenizer = make_tokenizer(chat=chat, eos=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", *tags]})
    return tokenizer


def seen(tokenizer, text: str, stops=(3,)) -> str:
    return CompletionText(tokenizer, stops).of(tokenizer.encode(text, add_special_tokens=False))


def test_tags_that_are_special_tokens_reach_the_reward():
    tokenizer = tokenizer_with_tags(*TAGS, "[tool]")
    text = seen(tokenizer, PERFECT + "<eos>")
    assert re.sub(r"\s", "", text) == re.sub(r"\s", "", PERFECT)
    assert format_reward(["q"], [text]) == [1.0]
    assert "[tool]" in seen(tokenizer, "[tool] a")  # a reward of the user's may look for it


def test_what_marks_ends_and_turns_does_not_reach_the_reward():
    tokenizer = tokenizer_with_tags(*TAGS)
    assert seen(tokenizer, "a b <|end|> <|start|> <pad> <eos>").split() == ["a", "b"]
    assert seen(tokenizer_with_tags("[x]", chat=None), "a [x] <|end|>", stops=(3, 5)).split() == ["a", "[x]"]
    broken = tokenizer_with_tags(chat="{{ raise_exception('no') }}<|end|>")
    assert seen(broken, "a <|end|>").split() == ["a"]


def test_a_tag_stays_even_where_a_completion_ends_on_it():
    tokenizer = tokenizer_with_tags(*TAGS, eos="</answer>")
    end = tokenizer.convert_tokens_to_ids("</answer>")
    assert seen(tokenizer, PERFECT, stops=(end,)).endswith("</answer>")


def test_tags_that_a_template_shows_are_no_turns():
    thinking = tokenizer_with_tags(*TAGS, chat=CHAT.replace("assistant :", "assistant :<think></think>"))
    assert seen(thinking, PERFECT).startswith("<think>")


OTHER_TAGS = [("[THINK]", "[/THINK]"), ("<|think|>", "<|/think|>"), ("<tool_call>", "</tool_call>")]


@pytest.mark.parametrize("tags", OTHER_TAGS)
def test_tags_of_other_names_reach_the_reward(tags):
    """Wherever the template shows them: in its own words, around what it leaves out, before an answer, or as an end."""
    said, opened = f"{{{{ '{tags[0]} think {tags[1]}' }}}}" + CHAT, CHAT.replace("assistant :", f"assistant :{tags[0]}")
    for chat in (None, said, opened):
        tokenizer = tokenizer_with_tags(*tags, "[INST]", "[/INST]", chat=chat)
        stops = (3, tokenizer.convert_tokens_to_ids(tags[1]))
        assert seen(tokenizer, f"{tags[0]} a {tags[1]} <eos>", stops).split() == [tags[0], "a", tags[1]]
    around = "{% for m in messages %}[INST] {{ m.content }}[/INST]{% endfor %}"
    tokenizer = tokenizer_with_tags(*tags, "[INST]", "[/INST]", chat=around)
    assert seen(tokenizer, f"[INST] {tags[0]} [/INST] a").split() == [tags[0], "a"]


def test_a_token_that_only_begins_answers_is_the_answers():
    tokenizer = tokenizer_with_tags("<|thought|>", chat=CHAT.replace("assistant :", "assistant :<|thought|>"))
    assert seen(tokenizer, "<|thought|> a <|end|>").split() == ["<|thought|>", "a"]


def test_both_backends_keep_them(tiny_model: Path):
    """The text of a perfect completion, as a backend makes it, is paid."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    policy = make_policy(tiny_model)
    policy.tokenizer = tokenizer
    backend = HFBackend(policy, max_batch_size=2)
    ids = [*tokenizer.encode("<think>6 + 2</think><answer>6 + 2</answer>"), tokenizer.eos_token_id]
    completion = backend._completion(SampledSequence(0, 0, 0, ids, [0.0] * len(ids), stopped=True))
    answer = {"token_ids": ids, "logprobs": {"content": []}, "finish_reason": "stop", "weight_versions": []}
    vllm = SimpleNamespace(completion_text=CompletionText(tokenizer, policy.stop_token_ids), adapters=False, version=0)
    flight = InFlight([], Sampling(9), 0, None, None, [])
    for text in (completion.text, VLLMBackend._completion(vllm, answer, flight).text):
        assert countdown_reward(["q"], [text], nums=[[6, 2]], target=[8]) == [1.0]


def test_validate_says_which_tags_are_special(rows_file):
    (warning,) = checked(tokenizer_with_tags("<think>", "</think>"), {"path": rows_file}, model={"vocab_size": 99})
    assert "<think>, </think> are special tokens of the tokenizer; rewards see them as text" in warning
    tag, model = tokenizer_with_tags("</think>", eos="</think>"), {"vocab_size": 99, "eos_token_id": 51}
    special, ends = checked(tag, {"path": rows_file}, model=model)
    assert "</think> is a special token" in special
    assert "a completion ends on </think>, a tag of its form" in ends
