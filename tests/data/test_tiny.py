"""The tiny model's room: its tokenizer, its weights, and the search traces it starts from."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import countdown, tiny, traces
from rewards.countdown import verify

BASE = Path(tiny.__file__).parent / "tiny_base"
RANGE = {"min_numbers": 3, "max_numbers": 3, "max_number": 9, "min_target": 1, "max_target": 60}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("6 3 9 = 27", 5),
        ("(6+3)*3", 7),
        ("<think> 6 + 3 = 9 < </think> <answer> 6 + 3 </answer>", 13),
        ("0 299 300 1234", 6),
        ("A conversation between User and Assistant's, e.g. {x} -5!", None),
    ],
)
def test_text_round_trips_but_for_spaces(tokenizer, text, tokens):
    token_ids = tokenizer.encode(text)
    assert tokenizer.unk_token_id not in token_ids
    assert tokenizer.decode(token_ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert tokens is None or len(token_ids) == tokens


def test_numbers_are_never_torn_apart_nor_joined(tokenizer):
    for text in ("7 29", "729", "1 2 3 4 5", "1234567 89"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_control_tokens_are_special(tokenizer):
    token_ids = [*tokenizer.encode("<think> yes </think>"), tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "<think> yes </think>"
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]


def test_a_student_has_less_than_a_quarter_of_the_parameters(tokenizer):
    whole, student = tiny.make_tiny_model(), tiny.make_tiny_model(width=64, layers=3)
    assert student.num_parameters() < whole.num_parameters() / 4
    assert student.config.head_dim == whole.config.head_dim
    with pytest.raises(ValueError, match="96 is not a multiple of 64"):
        tiny.make_tiny_model(width=96)


def test_untrained_model_is_a_function_of_its_seed(tmp_path):
    tiny.write_tiny_model(tmp_path, seed=3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.num_parameters() < 1_000_000
    weights = [tiny.make_tiny_model(seed).state_dict()["model.embed_tokens.weight"] for seed in (3, 4)]
    assert torch.equal(loaded.state_dict()["model.embed_tokens.weight"], weights[0])
    assert not torch.equal(weights[0], weights[1])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode("12 34")) == "12 34"
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == tokenizer.eos_token_id


def test_committed_base_fits_the_code_and_the_repository(tokenizer):
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 5_000_000
    assert AutoTokenizer.from_pretrained(BASE).get_vocab() == tokenizer.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config, expected = json.loads((BASE / "config.json").read_text()), tiny.tiny_config(tokenizer).to_dict()
    assert {key: config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size", "eos_token_id")} == {
        key: expected[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size", "eos_token_id")
    }
    prompt = tokenizer("6 3 9 = 27", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=192, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.startswith("<think>")
    assert verify([6, 3, 9], 27, text).outcome.value in ("correct", "wrong")  # it answers in the right form


# --- traces


def test_traces_are_true_and_end_in_an_answer(tokenizer):
    rows = traces.build("train", 300, seed=1)
    assert set(rows.column_names) == {"prompt", "completion"}
    for row in rows:
        nums, target = ([int(n) for n in part.split()] for part in row["prompt"].split(" = "))
        verdict = verify(nums, target[0], row["completion"])
        thinking = row["completion"].split("</think>")[0]
        assert verdict.outcome.value == ("correct" if "yes" in thinking else "wrong"), row
        assert tokenizer.decode(tokenizer.encode(row["completion"])) == row["completion"]
        for left, right in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", thinking):
            assert eval(left) == int(right)  # our own text, not a model's
        for value, goal, says in re.findall(r"= (\d+) \? (\d+) (<|>|yes)", thinking):
            assert int(goal) == target[0]
            assert says == ("<" if int(value) < target[0] else ">" if int(value) > target[0] else "yes")


def test_diligence_is_mixed_and_most_give_up():
    draw = random.Random(0)
    blind = [traces.trace([7, 8, 9], 1000, draw, give_up=(0.6, 0.3), longest=12) for _ in range(500)]
    tried = [text.count("?") for text in blind]
    shares = {n: tried.count(n) / len(tried) for n in (1, 2, 12)}
    assert set(tried) == {1, 2, 12}
    assert shares == pytest.approx({1: 0.6, 2: 0.3, 12: 0.1}, abs=0.06)


def test_no_attempt_is_made_twice_and_a_small_spread_guesses_better():
    text = traces.trace([2, 3, 5], 1000, random.Random(0), give_up=(), longest=100)
    tried = text.removeprefix("<think> ").split(" </think>")[0].split(" ? 1000 < ")
    assert len(tried) == len(set(tried)) == len(traces.attempts((2, 3, 5)))

    def hits(spread: float) -> int:
        draw = random.Random(0)
        return sum("yes" in traces.trace([2, 3, 5], 25, draw, give_up=(1.0,), spread=spread) for _ in range(300))

    assert hits(3.0) > 2 * hits(1e9) > 0


def test_traces_hold_out_what_countdown_holds_out():
    def tasks(rows):
        pairs = (row["prompt"].split(" = ") for row in rows)
        return {(*sorted(map(int, nums.split())), int(target)) for nums, target in pairs}

    train = tasks(traces.build("train", 3000, seed=1))
    held_out = tasks(countdown.build("eval", None, 0, question="compact", **RANGE))
    assert len(held_out) >= 500
    assert not train & held_out
    assert traces.build("train", 20, seed=1).to_list() == traces.build("train", 20, seed=1).to_list()
    assert traces.build("train", 20, seed=1).to_list() != traces.build("train", 20, seed=2).to_list()


@pytest.mark.parametrize(
    "wrong", [{"give_up": (0.7, 0.7)}, {"give_up": (-0.1,)}, {"give_up": (0.1, 0.1), "longest": 2}, {"spread": 0}]
)
def test_senseless_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        traces.trace([1, 2, 3], 6, random.Random(0), **wrong)
