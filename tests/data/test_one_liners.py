"""data/one_liners.py and its traces: what is told, what is tested and what is written agree, token by token."""

from __future__ import annotations

import json
import random
from itertools import islice

import pytest
from transformers import AutoTokenizer

from data import one_liner_traces, one_liners, tiny
from rewards.code import verify
from rewards.verdict import Outcome


def told(prompt: str, x: int) -> int:
    """What the description says of ``x``, by other means than those that wrote the solution."""
    for operation in prompt.removeprefix("f ( x ) : ").split(" , "):
        word, *number = operation.split()
        n = int(number[0]) if number else 0
        x = {
            "add": x + n, "subtract": x - n, "times": x * n, "double": 2 * x, "triple": 3 * x, "negate": -x,
            "square": x * x,
        }[word]  # fmt: skip
    return x


@pytest.mark.parametrize("arguments", [{}, {"operations": [1, 5], "largest": 30}])
def test_tests_say_what_the_description_says(arguments):
    rows = one_liners.build("train", 300, 1, **arguments).to_list()
    for row in rows:
        tests = json.loads(row["tests"])
        assert tests["fn_name"] == "f"
        assert len(tests["inputs"]) >= 5
        assert tests["outputs"] == [told(row["prompt"], x) for (x,) in tests["inputs"]]
    assert len({row["prompt"] for row in rows}) == 300


def test_solutions_pass_once_they_went_through_the_tokenizer():
    """The one real thing: encoded, decoded, found as a fenced block, run."""
    tokenizer = tiny.build_tokenizer(one_liners.WORDS)
    for row in islice(one_liners.one_liners("eval", 0), 40):
        trace = one_liner_traces.trace(row, random.Random(0), haste=(0, 0))
        token_ids = tokenizer.encode(trace)
        assert tokenizer.unk_token_id not in token_ids
        assert len(token_ids) <= 70
        decoded = tokenizer.decode(token_ids, skip_special_tokens=True)
        assert decoded == trace
        assert verify(one_liners.tests(row), decoded).outcome is Outcome.CORRECT, decoded


def test_quality_is_mixed():
    def right(haste) -> float:
        rows = list(islice(one_liners.one_liners("train", 0), 150))
        traces = [one_liner_traces.trace(row, random.Random(str(row)), haste=haste) for row in rows]
        verdicts = [verify(one_liners.tests(row), trace) for row, trace in zip(rows, traces, strict=True)]
        return sum(verdict.outcome is Outcome.CORRECT for verdict in verdicts) / len(rows)

    assert right((0, 0)) == 1  # spelled out
    assert 0.3 < right((1, 0)) < 0.6  # hasty: right where no parentheses are needed
    assert right((0, 1)) < 0.1  # careless


def test_the_splits_share_no_description_and_rows_do_not_depend_on_size():
    train = one_liners.build("train", 3000, 0)["prompt"]
    assert not set(train) & set(one_liners.build("eval", 500, 7)["prompt"])
    assert one_liners.build("train", 20, 0)["prompt"] == train[:20]
    traces = [one_liner_traces.build("train", size, 3).to_list() for size in (20, 200)]
    assert traces[1][:20] == traces[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"operations": []}, "operations are integers from 1 to 5"),
        ({"operations": [6]}, "operations are integers from 1 to 5"),
        ({"largest": 1}, "largest is an integer from 2"),
        ({"size": 1000, "operations": [1]}, r"only \d+ distinct train descriptions, 1000 were asked for"),
        ({"split": "test"}, "split is train or eval"),
    ],
)
def test_senseless_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        one_liners.build(**{"split": "train", "size": 5, **arguments})


# --- the tokenizer with words of a task ------------------------------------------------------------------------------


def test_extra_words_come_behind_the_others_and_are_whole():
    plain, extended = tiny.build_tokenizer(), tiny.build_tokenizer(one_liners.WORDS)
    assert extended.get_vocab().items() >= plain.get_vocab().items()
    assert len(extended) > len(plain) == max(plain.get_vocab().values()) + 1
    for word in one_liners.WORDS:
        assert len(extended.encode(word)) == 1, word
    assert extended.encode("6 3 9 = 27 target") == plain.encode("6 3 9 = 27 target")
    assert extended.decode(extended.encode("x**2\n*3")) == "x ** 2 \n * 3"


def test_a_model_with_words_is_written_whole(tmp_path):
    tiny.write_tiny_model(tmp_path, extra=one_liners.WORDS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = one_liners.program("( x + 3 ) * 2")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == len(tokenizer)
