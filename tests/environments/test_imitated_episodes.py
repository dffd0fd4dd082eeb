"""What is imitated of an episode has the tokens that the same episode has when it is sampled."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from data import calculator_traces, number_guess, number_guess_traces, tiny
from grpo.config import DataConfig, RowsConfig
from grpo.environments.observations import Observations
from grpo.prompts import spoken
from tests.environments.playing import bytes_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# tools #}"
)


def observations(template, tokenizer, form, *, game=False):
    (source,) = DataConfig(path="x.jsonl", template=template).sources()
    chat = template == "chat"
    return Observations(source, tokenizer, [tokenizer.eos_token_id], form, 200, chat=chat, game=game)


def imitated(template, tokenizer, completion):
    """The tokens of a completion's messages, one list for each turn and each answer."""
    pieces = spoken.pieces(RowsConfig(path="x.jsonl", template=template), "q", completion, tokenizer)
    return [spoken.tokens([piece], tokenizer)[0] for piece in pieces]


@pytest.mark.parametrize(
    ("rows", "words", "form", "game"),
    [
        (calculator_traces.rows("train", 40, 0), calculator_traces.WORDS, "hermes", False),
        (calculator_traces.rows("train", 40, 0, form="python"), None, "python", False),
        (number_guess_traces.rows("train", 10, 0), number_guess.WORDS, "hermes", True),
    ],
    ids=["calculator", "python", "number_guess"],
)
def test_answers_in_plain_text_are_those_of_an_episode(rows, words, form, game):
    tokenizer = bytes_tokenizer() if words is None else tiny.build_tokenizer(words)
    of = observations("none", tokenizer, form, game=game)
    answers = 0
    for row in rows:
        turns = imitated("none", tokenizer, row["completion"])
        for place, message in enumerate(row["completion"]):
            if message["role"] == "assistant":
                continue
            said, before = message["content"], turns[place - 1][-1]
            expected = of.of_text(said, before).tokens if game else of.of_results([("tool", said)], before).tokens
            assert turns[place] == expected
            answers += 1
    assert answers > 10


def test_an_answer_gets_no_space_before_it():
    """Some tokenizers put one before all that they encode. An answer stands behind a turn, so it has none."""
    tokenizer = bytes_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    said = (("assistant", "a"), ("tool", "4"), ("assistant", "b"))
    completion = [{"role": role, "content": text} for role, text in said]
    turn, answer, _ = imitated("none", tokenizer, completion)
    assert answer == observations("none", tokenizer, "hermes").of_results([("tool", "4")], turn[-1]).tokens
    assert tokenizer.decode(answer) == "\n<tool_response>\n4\n</tool_response>\n"


@pytest.mark.parametrize("role", ["tool", "user"])
def test_answers_of_a_chat_template_are_those_of_an_episode(role):
    tokenizer = bytes_tokenizer(CHATML)
    of = observations("chat", tokenizer, "hermes", game=role == "user")
    completion = [
        {"role": "assistant", "content": "a call"},
        {"role": role, "content": "42"},
        {"role": "assistant", "content": "so 42"},
    ]
    turn, answer, _ = imitated("chat", tokenizer, completion)
    expected = of.of_results([("tool", "42")], turn[-1]).tokens if role == "tool" else of.of_text("42", turn[-1]).tokens
    assert turn == tokenizer.encode("a call<|im_end|>", add_special_tokens=False)
    assert answer == expected
