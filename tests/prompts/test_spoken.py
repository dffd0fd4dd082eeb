"""Completions of several messages: the model's alone are imitated, and an episode would have the same tokens."""

from __future__ import annotations

import pytest

from data import calculator_traces, number_guess, number_guess_traces, tiny, word_sums
from grpo.config import RowsConfig
from grpo.errors import UserError
from grpo.prompts import spoken
from grpo.prompts.spoken import Piece
from tests.prompts.small_rows import CHAT, make_tokenizer, recipe, write_rows

PLAIN, CHATTED = RowsConfig(path="x.jsonl", template="none"), RowsConfig(path="x.jsonl", template="chat")
CALL, RESULT = {"role": "assistant", "content": "call"}, {"role": "tool", "content": "42"}
ANSWER = {"role": "assistant", "content": "so 42"}


def test_each_message_of_the_model_ends_as_it_ends_it_and_the_rest_is_the_environments():
    tokenizer = make_tokenizer()
    pieces = spoken.pieces(PLAIN, "q", [CALL, RESULT, {"role": "user", "content": "go on"}, ANSWER], tokenizer)
    assert pieces == [
        Piece("call", own=True, eos=True),
        Piece("\n<tool_response>\n42\n</tool_response>\ngo on\n", own=False, eos=False),
        Piece("so 42", own=True, eos=True),
    ]
    ids, environment = spoken.tokens(pieces, tokenizer)
    own = [tokenizer.decode([t]) for place, t in enumerate(ids) if place not in environment]
    assert "".join(own) == "call<eos>so42<eos>"
    assert tokenizer.decode([ids[place] for place in environment]).replace(" ", "").endswith("goon")


def test_with_a_chat_template_the_environment_says_what_the_template_writes_between():
    tokenizer = make_tokenizer(chat=CHAT, eos="<|end|>")
    assert spoken.pieces(CHATTED, "q", [CALL, RESULT, ANSWER], tokenizer) == [
        Piece(" call", own=True, eos=True),
        Piece("<|start|>tool : 42<|end|><|start|>assistant :", own=False, eos=False),
        Piece(" so 42", own=True, eos=True),
    ]


def test_a_template_that_ends_turns_by_another_token_keeps_it_with_the_model():
    tokenizer = make_tokenizer(chat=CHAT)  # <|end|> ends a message, <eos> a text
    pieces = spoken.pieces(CHATTED, "q", [CALL, RESULT, ANSWER], tokenizer)
    assert [piece.own for piece in pieces] == [True, False, True]
    assert "".join(piece.text for piece in pieces).startswith(" call")


def test_a_call_in_plain_text_ends_its_turn_by_itself():
    call = {"role": "assistant", "content": "<tool_call> call </tool_call>"}
    pieces = spoken.pieces(PLAIN, "q", [call, RESULT, call, RESULT, ANSWER], make_tokenizer())
    assert [piece.eos for piece in pieces] == [False, False, False, False, True]
    assert spoken.pieces(PLAIN, "q", [CALL, RESULT, call], make_tokenizer())[-1].eos


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ([RESULT, ANSWER], "begins and ends with the assistant's"),
        ([CALL, RESULT], "begins and ends with the assistant's"),
        ([CALL, ANSWER], "two messages of the assistant in a row"),
    ],
)
def test_messages_in_another_order_are_refused(completion, said):
    with pytest.raises(ValueError, match=said):
        spoken.pieces(PLAIN, "q", completion, make_tokenizer())


def test_a_template_that_rewrites_earlier_messages_is_refused():
    forgets = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else '' }}")
    with pytest.raises(ValueError, match="shows earlier messages otherwise once others follow"):
        spoken.pieces(CHATTED, "q", [CALL, RESULT, ANSWER], make_tokenizer(chat=forgets, eos="<|end|>"))


def test_an_example_counts_the_models_tokens_and_a_wrong_row_is_named(tmp_path):
    from grpo.prompts.task import load_task

    rows = [{"prompt": "q", "completion": [CALL, RESULT, ANSWER]}]
    data = {"path": write_rows(tmp_path / "a.jsonl", rows * 2), "template": "none"}
    task = load_task(recipe(data, "sft", prompts_per_step=2), make_tokenizer())
    (example, _) = task.examples(0)
    assert (
        len(example.completion) - len(example.environment) == example.num_model_tokens == len("call") + len("so42") + 2
    )
    rows[0]["completion"] = [CALL, RESULT]
    data = {"path": write_rows(tmp_path / "b.jsonl", rows * 2), "template": "none"}
    task = load_task(recipe(data, "sft", prompts_per_step=2), make_tokenizer())
    with pytest.raises(UserError, match=r"b.jsonl:\d: a completion of several messages begins and ends"):
        task.examples(0)


def test_traces_are_few_tokens_right_where_they_look_up_and_mixed():
    tokenizer = tiny.build_tokenizer(calculator_traces.WORDS)
    sizes = {"events": 1, "largest": 99, "most": 9999, "boxed": 1.0, "boxes": 99, "each": 99}
    stories = word_sums.rows("train", 400, 0, **sizes)
    calls, right = [], []
    for story, row in zip(stories, calculator_traces.rows("train", 400, 0, **sizes), strict=True):
        assert row["prompt"] == story["prompt"]
        calls.append(len(row["completion"]) // 2)
        right.append(row["completion"][-1]["content"] == f"<answer> {story['answer']} </answer>")
        if calls[-1]:
            ids, _ = spoken.tokens(spoken.pieces(PLAIN, row["prompt"], row["completion"], tokenizer), tokenizer)
            assert len(ids) <= 40
            assert tokenizer.unk_token_id not in ids
    shares = [calls.count(number) / 400 for number in range(3)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.07)
    assert all(right[i] for i in range(400) if calls[i] == 2)
    assert sum(right[i] for i in range(400) if calls[i] < 2) < 20


def test_players_are_mixed_and_those_who_halve_need_six_turns():
    tokenizer = tiny.build_tokenizer(number_guess.WORDS)
    first = []
    for row in number_guess_traces.rows("train", 600, 0):
        turns = [message["content"] for message in row["completion"] if message["role"] == "assistant"]
        first.append(turns[0])
        assert len(set(turns)) == len(turns) <= 8
        if turns[:2] in (["32", "16"], ["32", "48"]):
            assert len(turns) <= 8
    assert first.count("32") / 600 == pytest.approx(0.15 + 0.85 / 63, abs=0.05)
    ids, environment = spoken.tokens(spoken.pieces(PLAIN, "q", row["completion"], tokenizer), tokenizer)
    assert len(ids) == 3 * len(turns) - 1
    assert len(environment) == len(turns) - 1
