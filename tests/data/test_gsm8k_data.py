"""data/gsm8k.py and what it shares with the other published data sets (data/sources.py)."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import gsm8k, sources
from rewards.math import verify
from rewards.verdict import Outcome


def problem(i: int, number: str | None = None) -> dict[str, str]:
    return {"question": f"Natalia sold {i} clips?", "answer": f"She sold {i}/2 = <<{i}/2=1>>1.\n#### {number or i}"}


def write(path, rows) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_from_a_folder(tmp_path):
    write(tmp_path / "train.jsonl", [problem(1), problem(2, "1,234"), problem(3, "-5"), problem(4, "2.50")])
    write(tmp_path / "test.parquet", [problem(9)])
    rows = gsm8k.build("train", path=str(tmp_path)).to_list()
    assert [row["answer"] for row in rows] == ["1", "1234", "-5", "2.50"]
    assert rows[0].keys() == {"prompt", "answer"}  # the worked solution is gone
    assert verify(rows[1]["answer"], "<answer>$1,234</answer>").outcome is Outcome.CORRECT
    assert gsm8k.build("eval", path=str(tmp_path))["prompt"] == ["Natalia sold 9 clips?"]
    (asked,) = gsm8k.build("eval", path=str(tmp_path), question="hashes")["prompt"]
    assert asked.startswith("Natalia sold 9 clips? Let's think")
    with pytest.raises(ValueError, match="question is one of plain, hashes, not 'boxed'"):
        gsm8k.build("eval", path=str(tmp_path), question="boxed")


def test_rows_from_shards_and_from_one_file(tmp_path):
    for shard in range(3):
        write(tmp_path / f"train-0000{shard}-of-00003.parquet", [problem(10 * shard + i) for i in range(2)])
    assert gsm8k.build("train", path=str(tmp_path))["answer"] == ["0", "1", "10", "11", "20", "21"]
    one = write(tmp_path / "mine.jsonl", [problem(7)])
    assert gsm8k.build("train", path=one)["answer"] == ["7"]
    with pytest.raises(ValueError, match="is one file, which is trained on"):
        gsm8k.build("eval", path=one)
    other = write(tmp_path / "other.jsonl", [problem(8)])
    assert gsm8k.build("eval", path=one, eval_path=other)["answer"] == ["8"]


def test_size_takes_a_sample_that_the_seed_picks(tmp_path):
    path = write(tmp_path / "train.jsonl", [problem(i) for i in range(50)])

    def sample(size, seed):
        return [int(answer) for answer in gsm8k.build("train", size, seed, path=path)["answer"]]

    assert sample(10, 0) == sorted(sample(10, 0)) == sample(10, 0)
    assert set(sample(10, 0)) < set(sample(20, 0))
    assert sample(10, 0) != sample(10, 1)
    assert sample(None, 0) == sample(999, 0) == list(range(50))


def test_unsound_rows_are_named_and_counted(tmp_path):
    bad = [{"question": "q", "answer": "no number"}, {"question": " ", "answer": "#### 1"}, problem(3, "1/2")]
    path = write(tmp_path / "train.jsonl", [problem(1), *bad, *[problem(5, "x")] * 20])
    with pytest.raises(ValueError, match="can't be used") as caught:
        gsm8k.build("train", path=path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"23 of 24 rows in {path} can't be used:"
    assert lines[1] == f"  {path}:2: column 'answer' must end in #### and a number, got 'no number'"
    assert lines[2] == f"  {path}:3: column 'question' is empty"
    assert f"{path}:4" in lines[3]
    assert lines[11] == "  and 13 more"


def test_cut_files_and_missing_columns_are_refused(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(problem(1)) + "\n" + json.dumps(problem(2))[:-5])
    with pytest.raises(ValueError, match=r"train\.jsonl:2: not valid JSON"):
        gsm8k.build("train", path=str(path))
    other = write(tmp_path / "other.jsonl", [{"problem": "q", "answer": "#### 1"}])
    with pytest.raises(ValueError, match="no column 'question'"):
        gsm8k.build("train", path=other)


def test_without_a_network_the_message_says_what_to_give():
    """The tests run without one (conftest.py), so this is the real refusal of the hub's client."""
    with pytest.raises(ValueError, match=r"can't load split 'train' of openai/gsm8k: .* give data\.args\.path"):
        gsm8k.build("train")
    assert gsm8k.needs_network()
    assert not gsm8k.needs_network(path="somewhere")


def test_folders_without_the_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        gsm8k.build("train", path=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"no test\.jsonl, test\.parquet or eval\.jsonl"):
        gsm8k.build("eval", path=str(tmp_path))
    write(tmp_path / "training-notes.jsonl", [problem(1)])
    with pytest.raises(ValueError, match=r"no train\.jsonl"):  # a name that only begins alike is another file
        sources.find_files(tmp_path, ["train"])
