"""Where rows come from: files, the hub, tasks; which are held out; and which are refused, by file and line."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo.errors import UserError
from grpo.scoring.call import Call, FunctionSpec, RewardFunction
from grpo.scoring.messages import Answer, Request
from grpo.types import REWARD_KEYWORDS
from tests.prompts.small_rows import load, questions, write_rows

TRL_GIVES = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
WE_GIVE = ("status", "prefill", "log_verdict")


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
    assert Counter(task.train.row(row)["prompt"] for row in task.train.ids) == {
        row["prompt"]: 3 for row in questions(12) if row["prompt"] not in held_out
    }
    assert task.notes == ["10 rows repeat a held-out question and are left out of training"]


GAME = {"environment": {"name": "number_guess"}}


def test_with_an_environment_a_question_is_a_whole_row(tmp_path):
    """``reset`` makes the task of all columns, so prompts may be the same."""
    rows = [{"prompt": "guess", "secret": i % 12} for i in range(36)]
    with pytest.raises(UserError, match="can't hold out 5 of the 1 different questions"):
        load({"path": write_rows(tmp_path / "rows.jsonl", rows), "eval_size": 5})
    task = load({"path": str(tmp_path / "rows.jsonl"), "eval_size": 5}, **GAME)
    held_out = {p.columns["secret"] for p in task.eval_prompts}
    assert len(held_out) == 5
    assert {task.train.row(row)["secret"] for row in task.train.ids} == set(range(12)) - held_out
    assert task.notes == ["10 rows repeat a held-out question and are left out of training"]


@pytest.mark.parametrize("apart", [False, True], ids=["of the same file", "of another file"])
def test_rows_of_a_prompt_alone_are_the_environments_and_none_repeats_another(tmp_path, apart):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "play"}] * 20)
    other = {"eval_path": write_rows(tmp_path / "eval.jsonl", [{"prompt": "play"}] * 6)} if apart else {}
    task = load({"path": path, "eval_size": 6} | other, **GAME)
    assert len(task.eval_prompts) == 6
    assert len(task.train) == (20 if apart else 14)
    assert task.notes == []


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


def test_a_step_larger_than_the_data_is_refused(rows_file):
    with pytest.raises(UserError, match=r"prompts_per_step: a step of 24 different prompts .* the 23 rows"):
        load({"path": rows_file}, prompts_per_step=24)


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
        ({"name": "files.py"}, "no task 'files.py'.* file.py:build names a task of your own"),
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
    assert [task.train.row(i) for i in range(3)] == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", b"", "no rows"),
        ("rows.txt", b"a,b", "give a .jsonl, .parquet or .csv file"),
        ("rows.csv", b"prompt,answer\n", "no rows"),
        ("rows.csv", b"prompt,prompt\na,b\n", "the first line names the columns; 'prompt' is empty or there twice"),
        ("rows.csv", b'prompt\n"a', "not readable as CSV: line 2"),
        (
            "rows.csv",
            b"what is 1 ?,2\nwhat is 2 ?,3\n",
            "the first line names the columns; there is no prompt, but 'what is",
        ),
        ("rows.csv", b"prompt\na\xff", "not UTF-8"),
        ("rows.parquet", b"PAR1 and then nothing", "not a readable parquet file"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"data.path: .*{name}: {said}"):
        load({"path": str(tmp_path / name)})


@pytest.mark.parametrize("header", ["prompt;answer", "prompt\tanswer", '"prompt", "answer"', "answer,prompt"])
def test_csv_of_other_tongues(tmp_path, header):
    path = tmp_path / "rows.CSV"
    mark = next((mark for mark in ";\t" if mark in header), ",")
    long = "x, " * 50_000 if mark != "," else "x" * 150_000
    values = [f"{long}a", "3"] if header.startswith(("p", '"')) else ["3", f"{long}a"]
    between = f"{mark} " if f"{mark} " in header else mark
    path.write_text(f"{header}\n{between.join(values)}\n", encoding="utf-8")
    task = load({"path": str(path)}, prompts_per_step=1)
    assert dict(task.train.row(0)) == {"prompt": f"{long}a", "answer": "3"}


def test_csv_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt,answer,nums\r\n"how many, in\nall?",007,"[1, 2]"\r\nb,[3],[]\r\n\r\nc,,\r\nd,1.5,[4]\r\n'
    )
    task = load({"path": str(path), "shuffle": False}, prompts_per_step=4)
    assert [dict(task.train.row(i)) for i in range(4)] == [
        {"prompt": "how many, in\nall?", "answer": "007", "nums": [1, 2]},
        {"prompt": "b", "answer": "[3]", "nums": []},
        {"prompt": "c", "answer": None, "nums": None},
        {"prompt": "d", "answer": "1.5", "nums": [4]},
    ]
    path.write_text("prompt,answer\na,1\nb\n,3\n")
    with pytest.raises(UserError, match=rf"1 of 3 rows.*\n  {path}:3: 1 values for 2 columns"):
        load({"path": str(path)})
    path.write_text("prompt,answer\na,1\nb,\n,3\n")
    with pytest.raises(UserError, match=rf"1 of 3 rows.*\n  {path}:4: column 'prompt' is null"):
        load({"path": str(path)})
    path.write_text('prompt,answer\n"a\n\nb",1\n\nc,\n,3\n')
    with pytest.raises(UserError, match=rf"1 of 3 rows.*\n  {path}:7: column 'prompt' is null"):
        load({"path": str(path)})
    path.write_text(f"prompt,answer\n{'a' * 200_000},1\nb,2\n")
    rows = load({"path": str(path), "shuffle": False}, prompts_per_step=2).train.shares[0].rows
    assert (rows[0]["prompt"], rows.place(1)) == ("a" * 200_000, f"{path}:3")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b'{"prompt": "a", "x": {"y": 1, "y": 2}}', "the key 'y' is there twice"),  # Python's reader takes the last
        (b'{"prompt": "a", "x": ' + b"[" * 600 + b"]" * 600 + b"}", "nested too deeply"),
    ],
)
def test_json_that_is_read_in_more_than_one_way_or_too_deep_is_refused(tmp_path, row, said):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "b", "x": null}\n' + row)
    with pytest.raises(UserError, match=rf"1 of 2 rows.*\n.*rows.jsonl:2: {said}"):
        load({"path": str(tmp_path / "rows.jsonl")})


def test_what_is_no_readable_file_is_told_as_what_it_is(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name, said in (("rows.jsonl", "is a folder"), ("pipe.csv", "is no plain file"), ("none.csv", "no such file")):
        with pytest.raises(UserError, match=f"data.path: .*{name}: {said}"):
            load({"path": str(tmp_path / name)})
    latin = pa.array([b"a", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": latin}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet: not a readable parquet file \(.*UTF8"):
        load({"path": str(tmp_path / "rows.parquet")})


@pytest.mark.parametrize(
    "prompt", ["", " \n\t", "\u3000", "\u200b\ufeff", "\x00\x1b", [], [{"role": "user", "content": " "}]]
)
def test_a_blank_prompt_is_refused_by_row(tmp_path, prompt):
    spoken = [{"role": "user", "content": "a"}] if isinstance(prompt, list) else "a"
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": spoken}, {"prompt": prompt}])
    with pytest.raises(UserError, match=rf"1 of 2 rows .*\n  {path}:2: column 'prompt'"):
        load({"path": path})


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


@pytest.mark.parametrize("column", [*TRL_GIVES, *WE_GIVE])
def test_a_column_that_the_trainer_gives_to_reward_functions_itself_is_refused(tmp_path, column):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", column: "b", "completion": "c"}])
    with pytest.raises(UserError, match=rf"{path}: rename the column '{column}'"):
        load({"path": path}, prompts_per_step=1)
    load({"path": path}, prompts_per_step=1, stage="sft")  # no reward function is called


def test_the_reserved_columns_are_what_a_reward_function_is_really_given():
    """A function of ``**kwargs`` alone gets the row's columns, its args, and the reserved names; nothing else."""
    spec = FunctionSpec("f", "here", module="tests.prompts.test_rows", attribute="given")
    row = pickle.dumps(("a question", {"answer": "1"}))
    request = Request(row=row, completions=["x"], completion_ids=[[1]], status=["stop"], prefill="")
    answer = Call(RewardFunction(spec), request, SimpleNamespace()).run()
    assert isinstance(answer, Answer)
    assert answer.columns["names"] == [sorted({*TRL_GIVES, *WE_GIVE, "answer"})]
    assert {*TRL_GIVES, *WE_GIVE} == REWARD_KEYWORDS


def given(log_extra, **kwargs):
    """A reward function that tells the names of its arguments."""
    log_extra("names", [sorted([*kwargs, "log_extra"])])
    return [0.0]


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
