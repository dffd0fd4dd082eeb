"""The order of prompts, and how a row becomes tokens."""

from __future__ import annotations

import pytest

from tests.prompts.small_rows import CHAT, load, make_tokenizer, questions, write_rows

# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(23, 4), (24, 4), (5, 4), (7, 7), (9, 1)])
def test_every_epoch_covers_every_row_once_and_no_step_has_a_row_twice(tmp_path, n, size):
    task = load({"path": write_rows(tmp_path / "rows.jsonl", questions(n))}, prompts_per_step=size)
    steps = [task.train_rows(step) for step in range(6 * n)]
    assert all(len(rows) == len(set(rows)) == size for rows in steps)
    stream = [row for rows in steps for row in rows]
    epochs = [stream[start : start + n] for start in range(0, len(stream) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n == 1 or len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_has_no_memory(rows_file):
    straight, jumping = load({"path": rows_file}), load({"path": rows_file})
    expected = [straight.train_rows(step) for step in range(40)]
    for step in (39, 0, 17, 17, 6, 38, 5):
        assert jumping.train_rows(step) == expected[step]
    assert load({"path": rows_file}, seed=1).train_rows(0) != expected[0]


def test_without_shuffle_rows_come_as_they_are(rows_file):
    task = load({"path": rows_file, "shuffle": False})
    assert [row for step in range(6) for row in task.train_rows(step)] == [*range(23), 0]


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_eos", [False, True])
def test_bos_comes_once_and_eos_never_ends_a_prompt(tmp_path, adds_eos):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ab"}, {"prompt": "<bos>ab"}])
    tokenizer = make_tokenizer(bos=True, adds_eos=adds_eos)
    task = load({"path": path, "shuffle": False}, tokenizer, prompts_per_step=2)
    expected = tokenizer.convert_tokens_to_ids(["<bos>", "a", "b"])
    assert [p.token_ids for p in task.train_prompts(0)] == [expected, expected]


def test_a_chat_prompt_gets_no_further_bos(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": "ab"}]}])
    tokenizer = make_tokenizer(bos=True, chat="<bos>" + CHAT)
    prompt = load({"path": path, "template": "chat"}, tokenizer, prompts_per_step=1).train_prompts(0)[0]
    assert prompt.token_ids[:2] == tokenizer.convert_tokens_to_ids(["<bos>", "<|start|>"])
    assert prompt.prompt == [{"role": "user", "content": "ab"}]


def test_supervised_examples(tmp_path):
    rows = [
        {"prompt": "a", "completion": "<think>b"},
        {"prompt": "a", "completion": "b<eos>"},
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows[:2])
    tokenizer = make_tokenizer()
    task = load({"path": path, "template": "tinyzero", "shuffle": False}, tokenizer, stage="sft", prompts_per_step=2)
    examples = task.examples(0)
    assert [tokenizer.convert_ids_to_tokens(completion) for _, completion in examples] == [["b", "<eos>"]] * 2
    assert examples[0][0] == task.train_prompts(0)[0].token_ids
    assert task.train_prompts(0)[0].columns == {}

    path = write_rows(tmp_path / "rows.jsonl", [{**rows[2], "prompt": f"{c} ?"} for c in "abcdef"])
    task = load({"path": path, "eval_size": 2}, tokenizer, stage="sft", prompts_per_step=2)
    assert [tokenizer.convert_ids_to_tokens(c) for _, c in task.eval_examples[""]] == [["b", "<eos>"]] * 2
