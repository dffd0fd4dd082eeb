"""`data.mix`: shares by weight, epochs of each source, no row twice in a step, the same after any jump."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from grpo.errors import UserError
from grpo.prompts.mixture import Mixture, most_of_step
from tests.prompts.small_rows import CHAT, load, make_tokenizer, questions, write_rows


def mixture(sizes: dict[str, int], weights: list[float], size: int = 8, shuffle: bool = True, seed: int = 0) -> Mixture:
    ids, first = [], 0
    for n in sizes.values():
        ids.append(list(range(first, first + n)))
        first += n
    return Mixture(list(sizes), weights, ids, size=size, seed=seed, shuffle=shuffle)


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.5, 0.3, 0.2], [1, 100]])
def test_a_step_has_its_share_of_each_source_rounded_up_or_down(weights: list[float]) -> None:
    P, steps = 8, 4000
    made = mixture({f"s{i}": 50 for i in range(len(weights))}, weights, P)
    counts = np.array([np.bincount(made.sources_at(P * step), minlength=len(weights)) for step in range(steps)])
    exact = P * np.array(weights) / sum(weights)
    assert (np.abs(counts - exact) < 1).all()
    sigma = 0.5 / np.sqrt(steps)
    assert counts.mean(0) == pytest.approx(exact, abs=5 * sigma)


def test_sources_come_in_no_order_within_a_step() -> None:
    made = mixture({"a": 50, "b": 50}, [1, 1])
    first = Counter(made.sources_at(8 * step)[0] for step in range(2000))
    assert first[0] == pytest.approx(1000, abs=5 * np.sqrt(500))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("sizes", [{"a": 17, "b": 9}, {"a": 16, "b": 16}, {"a": 40, "b": 5}])
def test_each_source_runs_through_its_rows_before_one_comes_again(sizes: dict[str, int], shuffle: bool) -> None:
    weights = [4.0, 1.0] if sizes["b"] < 8 else [1.0, 1.0]
    made = mixture(sizes, weights, shuffle=shuffle)
    drawn = [row for step in range(200) for row in made.rows_at(8 * step)]
    for first, n in ((0, sizes["a"]), (sizes["a"], sizes["b"])):
        own = [row for row in drawn if first <= row < first + n]
        epochs = [own[i : i + n] for i in range(0, len(own) - n + 1, n)]
        assert all(sorted(epoch) == list(range(first, first + n)) for epoch in epochs)
        assert shuffle == (len({tuple(epoch) for epoch in epochs}) > 1)


def test_no_row_comes_twice_in_a_step_wherever_it_begins() -> None:
    made = mixture({"a": 9, "b": 8, "c": 40}, [1, 1, 2])
    for start in range(600):  # also in the middle of a block: dynamic sampling draws beyond a step
        rows = made.rows_at(start)
        assert len(set(rows)) == len(rows) == 8


def test_the_order_has_no_memory_and_a_seed() -> None:
    weights = [2.0, 1.0]
    straight = mixture({"a": 11, "b": 9}, weights)
    expected = [straight.rows_at(start) for start in range(0, 900, 7)]
    jumping = mixture({"a": 11, "b": 9}, weights)
    for place in (128, 0, 64, 63, 65, 127, 3):
        assert jumping.rows_at(7 * place) == expected[place]
    far = mixture({"a": 11, "b": 9}, weights)
    assert far.rows_at(8 * 5000) == straight.rows_at(8 * 5000)
    assert mixture({"a": 11, "b": 9}, weights, seed=1).rows_at(0) != expected[0]


def test_how_many_rows_a_source_needs() -> None:
    assert most_of_step(1, [1, 1], 8) == 8
    assert most_of_step(1, [1, 99], 8) == 2
    assert most_of_step(0.3, [0.3, 0.7], 10) == 6


# --- as a task -------------------------------------------------------------------------------------------------------


def two_files(folder: Path, **first: object) -> dict:
    other = [{"question": f"say {i} !", "gold": i} for i in range(31)]
    return {
        "mix": [
            {"path": write_rows(folder / "sums.jsonl", questions(23)), "eval_size": 4, "weight": 3, **first},
            {
                "path": write_rows(folder / "others.jsonl", other),
                "prompt_column": "question",
                "template": "tinyzero",
                "label": "spoken",
                "eval_size": 2,
            },
        ],
    }


def test_each_source_has_its_template_and_columns(tmp_path: Path) -> None:
    task = load(two_files(tmp_path), prompts_per_step=8)
    seen = Counter()
    for step in range(6):
        for prompt in task.train_prompts(step):
            seen[prompt.source] += 1
            if prompt.source == "sums":
                assert (list(prompt.columns), prompt.prefill) == (["answer"], "")
                assert prompt.text == prompt.prompt == f"what is {prompt.columns['answer']} ?"
            else:
                assert (list(prompt.columns), prompt.prefill) == (["gold"], "<think>")
                assert prompt.prompt in prompt.text
    assert seen == {"sums": 36, "spoken": 12}
    assert task.columns == {"sums": ["answer"], "spoken": ["gold"]}
    assert Counter(prompt.source for prompt in task.eval_prompts) == {"sums": 4, "spoken": 2}


def test_ids_are_different_rows(tmp_path: Path) -> None:
    task = load(two_files(tmp_path), prompts_per_step=8)
    assert len(set(task.train.ids)) == len(task.train) == 19 + 29
    rows = {prompt.id: prompt.prompt for step in range(20) for prompt in task.train_prompts(step)}
    assert len(set(rows.values())) == len(rows)
    for row, text in rows.items():
        assert task.prompt(task.train, row).prompt == text
        assert text in task.train.row(row).values()
    assert {task.train.place(row).rpartition("/")[2].partition(":")[0] for row in rows} == {
        "sums.jsonl",
        "others.jsonl",
    }


def test_no_question_of_one_source_is_held_out_of_another(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", questions(40))
    again = write_rows(tmp_path / "again.jsonl", questions(40))
    task = load({"mix": [{"path": rows, "eval_size": 8}, {"path": again, "eval_size": 0}]}, prompts_per_step=4)
    held_out = {prompt.prompt for prompt in task.eval_prompts}
    assert not held_out & {task.train.row(row)["prompt"] for row in task.train.ids}
    assert len(task.train) == 64
    assert any("8 rows of again repeat a held-out question" in note for note in task.notes)


def test_supervised_examples_of_each_source(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": f"{c} ?", "completion": c} for c in "abcdefgh"])
    two = write_rows(tmp_path / "two.jsonl", [{"prompt": f"{c} !", "said": "yes"} for c in "ijklmnop"])
    mix = [{"path": one, "eval_size": 2}, {"path": two, "completion_column": "said", "eval_size": 3}]
    tokenizer = make_tokenizer()
    task = load({"mix": mix}, tokenizer, stage="sft", prompts_per_step=4)
    texts = ["".join(tokenizer.convert_ids_to_tokens(answer)) for step in range(4) for _, answer in task.examples(step)]
    assert texts.count("yes<eos>") == 8
    assert {source: len(examples) for source, examples in task.eval_examples.items()} == {"one": 2, "two": 3}


def test_rows_that_are_too_long_are_dropped_by_source(tmp_path: Path) -> None:
    data = two_files(tmp_path) | {"too_long": "drop", "max_prompt_length": 30}
    with pytest.raises(UserError, match=r"8 different prompts of data\.mix\[1\]|of data\.mix\[1\]"):
        load(data, prompts_per_step=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_size": 30}, r"data\.mix\[0\]\.train_size: 30 rows are more than the 19"),
        ({"eval_size": 30}, r"data\.mix\[0\]\.eval_size: can't hold out 30"),
        ({"path": "nowhere.jsonl"}, r"data\.mix\[0\]\.path: nowhere\.jsonl: no such file"),
        ({"prompt_column": "text"}, r"column 'text' is missing"),
    ],
)
def test_what_is_wrong_with_a_source_names_it(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(two_files(tmp_path, **change), prompts_per_step=8)


def test_a_source_with_too_few_rows_for_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"8 different prompts of data\.mix\[0\] needs more than the 5 rows"):
        load(two_files(tmp_path, train_size=5), prompts_per_step=8)


def test_a_chat_template_of_one_source_alone(tmp_path: Path) -> None:
    task = load(two_files(tmp_path, template="chat"), make_tokenizer(chat=CHAT), prompts_per_step=8)
    texts = {prompt.source: prompt.text for prompt in task.train_prompts(0)}
    assert texts["sums"].startswith("<|start|>user")
    assert texts["spoken"].startswith("A conversation")
