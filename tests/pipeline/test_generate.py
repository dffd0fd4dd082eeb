"""Sampling outside of training: killed anywhere it ends with the same bytes, and other samples are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from grpo.errors import UserError
from grpo.pipeline import generate as generate_module
from grpo.pipeline.generate import Wanted, generate
from grpo.pipeline.sampled import header_of, model_hash, read_header, read_samples, recipe_hash
from tests.conftest import make_recipe
from tests.launching import ROOT

WANTED = Wanted(n=3, prompts=10, chunk=4)


def recipe_of(model: Path, **sections: Any) -> Any:
    base: dict[str, Any] = {
        "data": {"args": {"question": "compact"}, "train_size": 24, "eval_size": 4, "max_prompt_length": 32},
        "rewards": [
            {"path": f"{ROOT}/tests/rewards_for_tests.py:length_divides_by_eight"},
            {"name": "format", "weight": 0.1},
        ],
        "rollout": {"num_generations": 4, "max_completion_length": 6},
        "scoring": {"workers": 1},
        "training": {"output_dir": "unused", "prompts_per_step": 4, "num_threads": 1},
    }
    for name, content in sections.items():
        base[name] = base.get(name, {}) | content if isinstance(content, dict) else content
    return make_recipe(model, **base)


@pytest.fixture(autouse=True)
def _a_process_of_its_own() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    file = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    generate(recipe_of(tiny_model), WANTED, file)
    return file


def copied(undisturbed: Path, folder: Path, size: int) -> Path:
    """What a killed process leaves: so many bytes."""
    file = folder / undisturbed.name
    file.write_bytes(undisturbed.read_bytes()[:size])
    header_of(file).write_bytes(header_of(undisturbed).read_bytes())
    return file


def test_what_is_in_the_file(undisturbed: Path) -> None:
    groups = list(read_samples(undisturbed))
    ids = [group["prompt_id"] for group in groups]
    assert len(ids) == 10
    assert ids == sorted(set(ids))
    for group in groups:
        assert [c["sample"] for c in group["completions"]] == [0, 1, 2]
        for completion in group["completions"]:
            assert set(completion["rewards"]) == set(completion["verdicts"]) == {"length_divides_by_eight", "format"}
            assert 1 <= len(completion["token_ids"]) <= 6
            assert completion["verdicts"]["length_divides_by_eight"] == "scored"
            assert completion["verdicts"]["format"] not in ("scored", "unscored")
    header = read_header(undisturbed)
    assert len(model_hash(header)) == len(recipe_hash(header)) == 64
    assert model_hash(header) != recipe_hash(header)


def test_a_killed_process_goes_on_to_the_same_bytes(
    tiny_model: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it had made in whole chunks kept, and half a line of the next chunk cut off."""
    ends = [0]
    for line in undisturbed.read_bytes().splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    chunks: list[int] = []
    sample = generate_module._sample

    def counted(recipe: Any, wanted: Any, prompts: Any, *rest: Any) -> Any:
        chunks.append(len(prompts))
        return sample(recipe, wanted, prompts, *rest)

    monkeypatch.setattr(generate_module, "_sample", counted)
    for size, expected in ((ends[6] + 7, [4, 2]), (ends[10], [])):
        chunks.clear()
        file = copied(undisturbed, tmp_path, size)
        generate(recipe_of(tiny_model), Wanted(n=3, prompts=10), file)  # the chunks are the file's
        assert file.read_bytes() == undisturbed.read_bytes()
        assert chunks == expected


def test_the_samples_of_a_prompt_are_the_same_among_others(tiny_model: Path, undisturbed: Path, tmp_path: Path) -> None:
    """More prompts, more samples and another chunk add to what was there, but for near-ties."""
    generate(recipe_of(tiny_model), Wanted(n=4, prompts=12, chunk=12), tmp_path / "more.jsonl")
    more = {group["prompt_id"]: group for group in read_samples(tmp_path / "more.jsonl")}
    for group in read_samples(undisturbed):
        assert more[group["prompt_id"]]["completions"][:3] == group["completions"]


def test_other_samples_are_refused(tiny_model: Path, undisturbed: Path, tmp_path: Path) -> None:
    """With everything that differs."""
    file = copied(undisturbed, tmp_path, 100)
    changes = {
        "training": {"seed": 1, "num_threads": 1},
        "rollout": {"temperature": 0.5},
        "data": {"args": {"question": "compact", "max_number": 9}},
    }
    with pytest.raises(UserError, match="holds samples of something else") as refused:
        generate(recipe_of(tiny_model, **changes), Wanted(n=5, prompts=10, chunk=5), file)
    for named in (
        *("training.seed: 0 -> 1", "rollout.temperature: absent -> 0.5", "wanted.n: 3 -> 5", "wanted.chunk: 4 -> 5"),
        "data: rows has changed",
    ):
        assert named in str(refused.value)
    assert file.stat().st_size == 100


def test_a_file_without_a_sample_is_begun_again(tiny_model: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A process that failed before its first chunk, because of its recipe say, binds nobody."""
    file = copied(undisturbed, tmp_path, 0)
    wanted, recipe = Wanted(n=1, prompts=1), recipe_of(tiny_model, rollout={"temperature": 0.5})
    generate(recipe, wanted, file)
    assert read_header(file)["recipe"]["rollout"]["temperature"] == 0.5
    assert len(list(read_samples(file))) == 1


def test_what_does_not_matter_to_a_sample_may_change(tiny_model: Path, undisturbed: Path, tmp_path: Path) -> None:
    file = copied(undisturbed, tmp_path, undisturbed.stat().st_size)
    changes = {"optimizer": {"learning_rate": 1.0}, "rollout": {"num_generations": 2}, "scoring": {"timeout": 3.0}}
    generate(recipe_of(tiny_model, **changes, training={"output_dir": "elsewhere"}), WANTED, file)


def test_a_file_that_is_another_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("mine\n")
    with pytest.raises(UserError, match="is there already"):
        generate(recipe_of(tiny_model), WANTED, file)
    assert file.read_text() == "mine\n"


def test_a_foreign_line_is_named(tiny_model: Path, undisturbed: Path, tmp_path: Path) -> None:
    file = copied(undisturbed, tmp_path, 0)
    file.write_text(json.dumps({"prompt_id": 10**6}) + "\n")
    with pytest.raises(UserError, match=r"samples.jsonl:1: is of prompt 1000000"):
        generate(recipe_of(tiny_model), WANTED, file)


def test_without_rewards_nothing_can_be_judged(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model).model_copy(update={"rewards": []})
    with pytest.raises(UserError, match="rewards: there are none"):
        generate(recipe, WANTED, tmp_path / "samples.jsonl")
