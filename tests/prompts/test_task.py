"""grpo/prompts/ and data/files.py: rows, their order, what is held out, prompts, and the checks before weights load."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from data import templates
from grpo.audit.rows import check_data
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.prompts.task import lint, load_task, stop_token_ids

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }} : {{ m.content }}"
    "{% if not loop.last or add_generation_prompt or m.role != 'assistant' or close is not defined %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant :{% endif %}"
)


def make_tokenizer(bos: bool = False, adds_eos: bool = False, chat: str | None = None, eos: str | None = "<eos>"):
    special = ["<pad>", "<unk>", "<bos>", "<eos>", "<|start|>", "<|end|>"]
    vocabulary = {
        token: index for index, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz0123456789.,:=<>/?!"])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    if bos or adds_eos:
        single = f"{'<bos> ' if bos else ''}$A{' <eos>' if adds_eos else ''}"
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>" if bos else None,
        eos_token=eos,
        additional_special_tokens=["<|start|>", "<|end|>"],
        chat_template=chat,
    )


def recipe(data: dict, stage: str = "grpo", prompts_per_step: int = 4, seed: int = 0, **sections) -> Recipe:
    return Recipe.model_validate(
        {
            "stage": stage,
            "model": {"name": "somewhere"},
            "data": {"eval_size": 0, **data},
            "rewards": [{"name": "countdown"}],
            "training": {"output_dir": "runs/x", "prompts_per_step": prompts_per_step, "seed": seed},
            **sections,
        }
    )


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(n: int) -> list[dict]:
    return [{"prompt": f"what is {i} ?", "answer": str(i)} for i in range(n)]


@pytest.fixture
def rows_file(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", questions(23))


def load(data: dict, tokenizer=None, **keywords):
    return load_task(recipe(data, **keywords), tokenizer or make_tokenizer())


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


def test_a_step_larger_than_the_data_is_refused(rows_file):
    with pytest.raises(UserError, match=r"prompts_per_step: a step of 24 different prompts .* the 23 rows"):
        load({"path": rows_file}, prompts_per_step=24)


# --- what is held out ------------------------------------------------------------------------------------------------


def test_held_out_rows_are_chosen_by_the_seed_and_not_trained_on(rows_file):
    task = load({"path": rows_file, "eval_size": 6})
    assert len(task.eval_prompts) == 6
    assert sorted([*task.held_out.ids, *task.train.ids]) == list(range(23))
    assert task.held_out.ids == load({"path": rows_file, "eval_size": 6}).held_out.ids
    assert task.held_out.ids != load({"path": rows_file, "eval_size": 6}, seed=1).held_out.ids
    assert task.notes == []


def test_a_repeated_question_is_never_in_both_parts(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", questions(12) * 3)
    task = load({"path": path, "eval_size": 5})
    held_out = [p.prompt for p in task.eval_prompts]
    assert len(set(held_out)) == 5
    assert Counter(task.train.rows[row]["prompt"] for row in task.train.ids) == {
        row["prompt"]: 3 for row in questions(12) if row["prompt"] not in held_out
    }
    assert task.notes == ["10 rows repeat a held-out question and are left out of training"]


def test_held_out_rows_of_a_file_of_their_own(tmp_path, rows_file):
    eval_path = write_rows(tmp_path / "eval.jsonl", [*questions(3), {"prompt": "a new one", "answer": "x"}])
    task = load({"path": rows_file, "eval_path": eval_path, "eval_size": 4})
    assert [p.prompt for p in task.eval_prompts][3] == "a new one"
    assert sorted(task.train.ids) == list(range(3, 23))
    assert task.notes == ["3 rows repeat a held-out question and are left out of training"]
    fewer = load({"path": rows_file, "eval_path": eval_path, "eval_size": 2})
    assert len(fewer.eval_prompts) == 2
    assert "2 of the 4 rows" in fewer.notes[0]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"eval_size": 23}, "data.eval_size: can't hold out 23 of the 23 different questions"),
        ({"eval_size": 21}, "training.prompts_per_step"),
        ({"train_size": 24}, "data.train_size: 24 rows are more than the 23"),
        ({"train_size": 3}, "more than the 3 rows to train on"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(rows_file, data, said):
    with pytest.raises(UserError, match=said):
        load({"path": rows_file, **data})


def test_train_size_takes_the_first_rows(rows_file):
    assert list(load({"path": rows_file, "train_size": 5}).train.ids) == [0, 1, 2, 3, 4]


# --- generated tasks and the hub -------------------------------------------------------------------------------------

COUNTDOWN = {
    "name": "countdown",
    "train_size": 40,
    "eval_size": 20,
    "args": {"max_number": 9, "min_target": 1, "max_target": 60, "max_numbers": 3, "question": "compact"},
}


def test_a_generated_task():
    task = load(COUNTDOWN)
    assert (len(task.train), len(task.eval_prompts)) == (40, 20)
    prompt = task.train_prompts(0)[0]
    assert prompt.columns.keys() == {"nums", "target"}
    assert prompt.prompt == prompt.text == f"{' '.join(map(str, prompt.columns['nums']))} = {prompt.columns['target']}"
    assert prompt.id in task.train.ids
    assert [p.columns for p in load(COUNTDOWN, seed=1).eval_prompts] != [p.columns for p in task.eval_prompts]


def test_a_generated_task_can_keep_its_own_seed():
    data = {**COUNTDOWN, "args": {**COUNTDOWN["args"], "seed": 5}}
    one, other = load(data, seed=0), load(data, seed=1)
    assert [p.columns for p in one.eval_prompts] == [p.columns for p in other.eval_prompts]
    assert one.train_rows(0) != other.train_rows(0)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"name": "countdwon"}, r"data.name: no task 'countdwon'; there are .*countdown"),
        ({"name": "files"}, "no task 'files'"),
        ({"name": "countdown", "args": {"numbers": 3}}, r"data.args: .*'numbers'; countdown takes seed, min_numbers"),
        ({"name": "countdown", "args": {"max_number": 0}}, "data.args: need 1 <= min_number"),
        ({**COUNTDOWN, "eval_size": 5000}, "data.args: countdown has only [0-9]+ distinct eval tasks"),
        ({"hub": "no/such-data"}, "data.hub: can't load split 'train' of no/such-data"),
    ],
)
def test_a_source_that_gives_no_rows_is_refused(monkeypatch, data, said):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError, match=said):
        load(data)


def test_hub_rows_with_a_split_of_their_own_to_hold_out(monkeypatch):
    import datasets

    asked = []

    def stored(path, /, *, split, **arguments):
        asked.append((path, split, arguments))
        return datasets.Dataset.from_list([{"question": f"{split} {i}", "answer": i} for i in range(9)])

    monkeypatch.setattr("datasets.load_dataset", stored)
    data = {"hub": "a/b", "prompt_column": "question", "eval_size": 9}
    task = load({**data, "args": {"name": "main", "eval_split": "test"}})
    assert asked == [("a/b", "train", {"name": "main"}), ("a/b", "test", {"name": "main"})]
    assert task.eval_prompts[0].prompt == "test 0"
    assert task.eval_prompts[0].columns == {"answer": 0}


def test_check_data_needs_neither_tokenizer_nor_network(rows_file):
    assert check_data(recipe({"path": rows_file, "eval_size": 3})) == ": 20 rows to train on, 3 held out"
    assert "checked when a run loads them" in check_data(recipe({"hub": "a/b"}))
    with pytest.raises(UserError, match="no such file"):
        check_data(recipe({"path": "nowhere.jsonl"}))


# --- corrupt rows ----------------------------------------------------------------------------------------------------

GOOD = b'{"prompt": "a ?", "answer": "1", "nums": [1, 2]}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "\xff ?", "answer": "1", "nums": [1]}', "not UTF-8 .byte 0xff at column 13"),
        pytest.param(b'{"prompt": %s}' % (b"9" * 5000), "JSON that can't be read", id="long number"),
        pytest.param(b'{"prompt": ' + b"[" * 200_000, "JSON that can't be read", id="deep nesting"),
        (b'{"prompt": "a ?", "answer": "1", "nu', "not valid JSON, or cut off .Unterminated string"),
        (b"[1, 2]", "not an object of columns but a list of numbers"),
        (b'"text"', "not an object of columns but a string"),
        (b"", "blank line"),
        (b'{"prompt": "a ?", "nums": [1]}', "column 'answer' is missing"),
        (b'{"answer": "1", "nums": [1]}', "column 'prompt' is missing .there are 'answer', 'nums'"),
        (
            b'{"prompt": "a ?", "answer": 1, "nums": [1]}',
            "column 'answer' is a number, in the first row it is a string",
        ),
        (
            b'{"prompt": "a ?", "answer": "1", "nums": ["1"]}',
            "column 'nums' is a list of strings, .* a list of numbers",
        ),
        (b'{"prompt": "a ?", "answer": "1", "nums": [1, "2"]}', "column 'nums' is a mixed list"),
        (b'{"prompt": "a ?", "answer": "1", "nums": [1], "x": 1}', "column 'x' is not in the first row"),
        (b'{"prompt": 5, "answer": "1", "nums": [1]}', "column 'prompt' is a number, not a string or a list of mess"),
        (
            b'{"prompt": null, "answer": "1", "nums": [1]}',
            "column 'prompt' is null, not a string or a list of messages",
        ),
        (b'{"prompt": "", "answer": "1", "nums": [1]}', "column 'prompt' is empty"),
        (b'{"prompt": [], "answer": "1", "nums": [1]}', "column 'prompt' is an empty list of messages"),
        (b'{"prompt": [{"role": "user"}], "answer": "1", "nums": [1]}', "message 1 is not an object with the strings"),
        (b'{"prompt": "a \\ud800 ?", "answer": "1", "nums": [1]}', "half a surrogate pair at character 3"),
    ],
)
def test_a_corrupt_row_is_named_by_file_and_line(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, line, GOOD]) + b"\n")
    with pytest.raises(UserError, match=rf"data.path: 1 of 4 rows in {path} are corrupt:\n  {path}:3: .*{said}"):
        load({"path": str(path)}, prompts_per_step=1)


def test_all_corrupt_rows_are_counted_and_the_first_ten_shown(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, *[b"{"] * 13, GOOD]))
    with pytest.raises(UserError) as caught:
        load({"path": str(path)}, prompts_per_step=1)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"data.path: 13 of 15 rows in {path} are corrupt:"
    assert [line.split(": ")[0] for line in lines[1:11]] == [f"  {path}:{number}" for number in range(2, 12)]
    assert lines[11:] == ["  and 3 more"]


def test_every_row_without_the_column_hints_at_the_key(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "a ?"}] * 3)
    with pytest.raises(UserError, match=r"do data.prompt_column and data.completion_column name the right columns"):
        load({"path": path}, prompts_per_step=1)


def test_sound_rows_of_all_sorts_pass(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "a ?", "answer": None, "nums": [], "score": 1},
        {"prompt": "ä ?", "answer": "1", "nums": [1], "score": 1.5},
        {"prompt": "\u2028 ?", "answer": None, "nums": [2, 3], "score": 2},
    ]
    path.write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode() + b"\n\n \n"
    )
    task = load({"path": str(path)}, prompts_per_step=3)
    assert [task.train.rows[i] for i in range(3)] == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", b"", "no rows"),
        ("rows.csv", b"a,b", "give a .jsonl or .parquet file"),
        ("rows.parquet", b"PAR1 and then nothing", "not a readable parquet file"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"data.path: .*{name}: {said}"):
        load({"path": str(tmp_path / name)})


def test_parquet_rows(tmp_path):
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist([{"prompt": f"q {i}", "nums": [i, i], "target": i} for i in range(8)]), path)
    prompt = load({"path": path, "shuffle": False}).train_prompts(1)[0]
    assert (prompt.id, prompt.prompt, prompt.columns) == (4, "q 4", {"nums": [4, 4], "target": 4})

    pq.write_table(pa.Table.from_pylist([{"prompt": p} for p in ("a", None, "b", "")]), path)
    with pytest.raises(UserError, match=rf"2 of 4 rows.*\n  {path}:2: column 'prompt' is null.*\n  {path}:4: .*empty"):
        load({"path": path})
    pq.write_table(pa.Table.from_pylist([{"question": "a"}]), path)
    with pytest.raises(UserError, match=r"no column prompt; its columns are question .data.prompt_column"):
        load({"path": path})


@pytest.mark.parametrize("completion", [None, 3, "", [{"role": "assistant"}]])
def test_supervised_rows_need_a_completion(tmp_path, completion):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": completion}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=rf"1 of 2 rows.*\n  {path}:2: column 'completion'"):
        load({"path": path}, stage="sft", prompts_per_step=1)


def test_a_column_that_reward_functions_get_anyway_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completions": "b"}])
    with pytest.raises(UserError, match="rename the column 'completions'"):
        load({"path": path}, prompts_per_step=1)


# --- templates and tokens --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "are messages, which need template: chat"),
        ({"template": "r1_zero"}, "are messages, which need template: chat"),
    ],
)
def test_messages_need_the_chat_template(tmp_path, data, said):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": "ab"}]}])
    with pytest.raises(UserError, match=said):
        load({"path": path, **data}, prompts_per_step=1)


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
    assert [tokenizer.convert_ids_to_tokens(c) for _, c in task.eval_examples] == [["b", "<eos>"]] * 2


# --- lint ------------------------------------------------------------------------------------------------------------

MODEL = {"vocab_size": 64, "max_position_embeddings": 4096, "eos_token_id": 3, "bos_token_id": None}


def run_lint(tokenizer, data: dict, task: bool = False, model: dict | None = None, generation=None, **keywords):
    made = recipe(data, **keywords)
    config = LlamaConfig(**(MODEL | (model or {})))
    return lint(made, tokenizer, config, generation, load_task(made, tokenizer) if task else None)


def test_a_sound_recipe_has_no_findings(rows_file):
    assert run_lint(make_tokenizer(), {"path": rows_file, "eval_size": 3}, task=True) == []
    assert run_lint(make_tokenizer(bos=True), {"path": rows_file, "template": "tinyzero"}, task=True) == []


def test_no_end_of_sequence_token(rows_file):
    without = make_tokenizer(eos=None)
    with pytest.raises(UserError, match=r"no end-of-sequence token in tokenizer.*\(model.tokenizer\).* rollout.stop"):
        run_lint(without, {"path": rows_file}, model={"eos_token_id": None})
    (warning,) = run_lint(without, {"path": rows_file}, model={"eos_token_id": None}, rollout={"stop": ["</answer>"]})
    assert "only on rollout.stop" in warning
    with pytest.raises(UserError, match="no end-of-sequence token to end the examples with"):
        run_lint(without, {"path": rows_file}, stage="sft")


def test_an_end_of_sequence_token_outside_the_vocabulary(rows_file):
    with pytest.raises(UserError, match=r"end-of-sequence token 3 \(<eos>\) is outside the model's vocabulary of 3"):
        run_lint(make_tokenizer(), {"path": rows_file}, model={"vocab_size": 3})
    with pytest.raises(UserError, match=r"token 900 .unknown to the tokenizer. is outside"):
        run_lint(make_tokenizer(), {"path": rows_file}, model={"eos_token_id": [3, 900]})


def test_a_tokenizer_larger_than_the_model(rows_file):
    (warning,) = run_lint(make_tokenizer(), {"path": rows_file}, model={"vocab_size": 20})
    assert "the tokenizer has 51 tokens, the model 20" in warning


def test_stop_tokens_that_disagree(rows_file):
    """As with Qwen2.5 base and a chat tokenizer: config says <|endoftext|>, the tokenizer <|im_end|>."""
    tokenizer, data = make_tokenizer(eos="<|end|>"), {"path": rows_file}
    (warning,) = run_lint(tokenizer, data)
    assert "ends a text with 5 (<|end|>), the model's configuration with 3 (<eos>)" in warning
    assert "model.tokenizer" in warning
    assert run_lint(tokenizer, data, generation=GenerationConfig(eos_token_id=[3, 5])) == []
    assert run_lint(tokenizer, data, model={"eos_token_id": 5}, generation=GenerationConfig(eos_token_id=5)) == []
    assert len(run_lint(tokenizer, data, model={"eos_token_id": 5}, generation=GenerationConfig(eos_token_id=3))) == 1


def test_stop_token_ids_are_all_of_them():
    tokenizer = make_tokenizer(eos="<|end|>")
    config = LlamaConfig(**(MODEL | {"eos_token_id": [3, 7]}))
    assert stop_token_ids(tokenizer, config, GenerationConfig(eos_token_id=[7, 9])) == [3, 5, 7, 9]
    assert stop_token_ids(tokenizer, config, None) == [3, 5, 7]
    assert stop_token_ids(make_tokenizer(eos=None), LlamaConfig(**(MODEL | {"eos_token_id": None})), None) == []


def test_a_prompt_longer_than_the_limit_is_named(tmp_path):
    rows = [{"prompt": "a" * n, "answer": "x"} for n in (8, 11, 30, 9, 10)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=rf"data.max_prompt_length: 2 of 5 .* longer than 10 .* has 30 \({path}:3\)"):
        run_lint(make_tokenizer(), {"path": path, "max_prompt_length": 10}, task=True)
    with pytest.raises(UserError, match=r"3 of 5 .* has 31 "):  # BOS counts
        run_lint(make_tokenizer(bos=True), {"path": path, "max_prompt_length": 10}, task=True)
    assert run_lint(make_tokenizer(), {"path": path, "max_prompt_length": 30}, task=True) == []


def test_a_completion_to_imitate_longer_than_the_limit_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n}", "completion": "b" * n} for n in (9, 10, 7, 8)])
    rollout = {"max_completion_length": 10}
    with pytest.raises(UserError, match=rf"rollout.max_completion_length: 1 of 4 .* has 11 \({path}:2\)"):
        run_lint(make_tokenizer(), {"path": path}, task=True, stage="sft", rollout=rollout)


def test_more_tokens_than_positions(rows_file):
    short = {"max_position_embeddings": 1000}
    with pytest.raises(
        UserError, match=r"max_prompt_length \(512\) \+ rollout.max_completion_length \(512\).* the 1000"
    ):
        run_lint(make_tokenizer(), {"path": rows_file}, model=short)
    lengths = {"rollout": {"max_completion_length": 100}, "evaluation": {"max_completion_length": 600}}
    with pytest.raises(UserError, match=r"\+ evaluation.max_completion_length \(600\)"):
        run_lint(make_tokenizer(), {"path": rows_file}, model=short, **lengths)


def test_a_chat_template_on_a_base_model(rows_file):
    data = {"path": rows_file, "template": "chat"}
    with pytest.raises(UserError, match=r"no chat template. This looks like a base model: take template: r1_zero"):
        run_lint(make_tokenizer(), data)
    with pytest.raises(UserError, match=r"ends an answer with '<\|end\|>', but the model stops on <eos>"):
        run_lint(make_tokenizer(chat=CHAT), data)
    tokenizer = make_tokenizer(chat=CHAT, eos="<|end|>")
    assert run_lint(tokenizer, data, task=True, model={"eos_token_id": 5}) == []


def test_a_chat_template_that_fails_is_an_error_with_its_words(rows_file):
    broken = make_tokenizer(chat="{{ raise_exception('system role not supported') }}")
    with pytest.raises(UserError, match=r"chat template fails: .*system role not supported"):
        run_lint(broken, {"path": rows_file, "template": "chat"})


def test_rows_that_the_chat_template_refuses_are_counted(tmp_path):
    conversations = [[{"role": role, "content": "hi"}] for role in ("user", "system", "user", "system")]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": messages} for messages in conversations])
    tokenizer = make_tokenizer(chat=CHAT, eos="<|end|>")
    data = {"path": path, "template": "chat", "system_prompt": "be brief"}
    with pytest.raises(UserError, match=rf"data: 2 of 4 rows can't be used, the first is {path}:2: .*of its own"):
        run_lint(tokenizer, data, task=True, model={"eos_token_id": 5})
    with pytest.raises(UserError, match=rf"{path}:2: "):
        load(data, tokenizer).train_prompts(0)


@pytest.mark.parametrize("template", ["chat", "tinyzero"])
def test_a_prompt_that_is_rendered_already(tmp_path, template):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ok"}, {"prompt": "<|start|>user : hi<|end|>"}])
    tokenizer = make_tokenizer(chat=CHAT, eos="<|end|>")
    data = {"path": path, "max_prompt_length": 1024}
    with pytest.raises(UserError, match=rf"1 of 2 prompts already hold .*<\|end\|> \(first {path}:2\).*template: none"):
        run_lint(tokenizer, data | {"template": template}, task=True, model={"eos_token_id": 5}, prompts_per_step=1)
    assert run_lint(tokenizer, data, task=True, model={"eos_token_id": 5}, prompts_per_step=1) == []


def test_all_problems_are_told_at_once(rows_file):
    with pytest.raises(UserError) as caught:
        run_lint(
            make_tokenizer(),
            {"path": rows_file, "template": "chat"},
            model={"vocab_size": 3, "max_position_embeddings": 9},
        )
    assert len(str(caught.value).splitlines()) == 3


def test_notes_on_the_rows_are_warnings(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", questions(9) * 2)
    assert run_lint(make_tokenizer(), {"path": path, "eval_size": 2}, task=True) == [
        "data: 2 rows repeat a held-out question and are left out of training"
    ]


def test_a_model_with_several_parts_is_read_at_its_text():
    text = SimpleNamespace(eos_token_id=3)
    assert stop_token_ids(make_tokenizer(), SimpleNamespace(get_text_config=lambda: text), None) == [3]
