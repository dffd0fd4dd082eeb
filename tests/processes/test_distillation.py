"""Runs that learn from a teacher, of one process, resumed to the bit; and ``grpo teach``: rows with a teacher's
likeliest tokens, the same bytes if it was killed, and what a run makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from data.tiny import write_tiny_model
from grpo import sft
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.model.teacher import Teacher
from grpo.pipeline import teach as module
from grpo.pipeline.teach import teach
from grpo.run.folder import release_run_folder
from tests.conftest import make_recipe
from tests.small_runs import lines, same_weights, small_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS = 150


def recipe_of(student: Path, folder: Path, teacher: dict[str, Any], **sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "stage": "sft",
        "rewards": [],
        "data": {"name": "traces", "train_size": ROWS, "eval_size": 20, "max_prompt_length": 32},
        "rollout": {"max_completion_length": 192},
        "optimizer": {"learning_rate": 3e-3},
        "training": {"output_dir": str(folder), "prompts_per_step": 8, "max_steps": 6, "num_threads": 1},
    }
    for name, content in sections.items():
        base[name] = base.get(name, {}) | content
    data = base.pop("data")
    made = make_recipe(student, **base, teacher=teacher).model_dump()
    made["data"] |= {"name": None} | data
    return Recipe.model_validate(made)


def run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, *, resume: bool = False) -> Path:
    monkeypatch.setattr(sft, "write_report_at_end", lambda folder: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = Path(recipe.training.output_dir)
    try:
        sft.train(recipe, resume)
    finally:
        release_run_folder(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_tiny_model(folder, seed=5, width=64, layers=1)
    return folder


def test_rows_survive_a_kill_and_teach_as_the_teacher_itself(
    tiny_model: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many tokens kept as there are, a run on the rows is the run with the teacher in the process, to the
    rounding of what is written."""
    AcceleratorState._reset_state(reset_partial_state=True)
    in_process = recipe_of(tiny_model, tmp_path / "in process", {"name": str(teacher), "dtype": "float32"})
    written = teach(in_process, tmp_path / "rows", 500, column="taught")
    assert written.rows == {"train": ROWS, "eval": 20}
    assert written.covered == pytest.approx(1.0, abs=1e-3)
    whole = {name: file.read_bytes() for name, file in written.files.items()}

    calls, likeliest = [0], Teacher.likeliest

    def killed(self: Teacher, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return likeliest(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "likeliest", killed)
        patch.setattr(module, "TOKENS", 1 << 20)  # a block in one micro-batch
        with pytest.raises(KeyboardInterrupt):
            teach(in_process, tmp_path / "again", 500, column="taught")
    file = tmp_path / "again/train.jsonl"
    assert len(file.read_bytes().splitlines()) == module.BLOCK
    file.write_bytes(file.read_bytes() + b'{"torn')
    teach(in_process, tmp_path / "again", 500, column="taught")
    assert {name: (tmp_path / f"again/{name}.jsonl").read_bytes() for name in whole} == whole
    with pytest.raises(UserError, match="holds rows that were made with another top_k: choose another folder"):
        teach(in_process, tmp_path / "again", 5, column="taught")

    of_rows = {"path": str(written.files["train"]), "eval_path": str(written.files["eval"])}
    from_rows = recipe_of(
        tiny_model, tmp_path / "from rows", {"column": "taught"}, data={"name": None, "train_size": None, **of_rows}
    )
    one, other = lines(run(in_process, monkeypatch)), lines(run(from_rows, monkeypatch))
    assert len(one) == len(other)
    for row, same in zip(one, other, strict=True):
        for name in ("loss", "teacher/kl", "cross_entropy", "eval/loss", "eval/teacher_kl"):
            if name in row:
                assert same[name] == pytest.approx(row[name], abs=2e-3), name
    kl = [row["eval/teacher_kl"] for row in one if "eval/teacher_kl" in row]
    assert kl[-1] < 0.9 * kl[0]


def test_a_supervised_run_with_a_teacher_resumes_to_the_bit(
    tiny_model: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(folder: Path, steps: int) -> Recipe:
        of_teacher = {"name": str(teacher), "dtype": "float32", "text_coef": 0.5}
        training = {"max_steps": steps, "save_every": 3, "eval_every": 0}
        return recipe_of(tiny_model, folder, of_teacher, training=training)

    whole = run(part(tmp_path / "whole", 5), monkeypatch)
    run(part(tmp_path / "parts", 3), monkeypatch)
    parts = run(part(tmp_path / "parts", 5), monkeypatch, resume=True)
    assert same_weights(whole, parts)
    (row,) = [row for row in lines(whole) if row["step"] == 5 and "loss" in row]
    assert row["loss"] == pytest.approx(row["teacher/kl"] + 0.5 * row["cross_entropy"], rel=1e-5)


def test_a_run_on_its_own_samples_resumes_to_the_bit(
    tiny_model: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any reward; and it comes nearer to its teacher."""
    keys: dict[str, Any] = {"teacher": {"name": str(teacher), "dtype": "float32"}, "rewards": []}
    keys |= {"training": {"save_every": 3}, "optimizer": {"learning_rate": 3e-3}}
    small_run(tiny_model, tmp_path / "whole", monkeypatch, steps=6, **keys)
    small_run(tiny_model, tmp_path / "parts", monkeypatch, steps=3, **keys)
    small_run(tiny_model, tmp_path / "parts", monkeypatch, steps=6, resume=True, **keys)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole")
    kl = [row["teacher/kl"] for row in lines(tmp_path / "whole")]
    assert len(kl) == 6
    assert kl[-1] < 0.95 * kl[0]
    assert not [name for name in lines(tmp_path / "whole")[0] if "reward" in name or "unscored" in name]
