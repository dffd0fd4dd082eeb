"""The loop around a backend that fails: the checkpoint is that of the last step made, and nothing of it is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from grpo import trainer
from grpo.backends import make_backend
from grpo.backends.vllm import serve
from grpo.errors import BackendFailed, UserError
from grpo.run.folder import release_run_folder
from tests.conftest import make_recipe
from tests.launching import ROOT

STEPS = 4


class FailingBackend:
    """The real hf backend, which fails when it is asked by ``verb`` for (or given) a version."""

    def __init__(self, backend: Any, verb: str, version: int):
        self.backend, self.fails_at = backend, (verb, version)

    def generate(self, requests: Any, sampling: Any, version: int, on_group: Any = None) -> Any:
        self._fail("generate", version)
        return self.backend.generate(requests, sampling, version, on_group)

    def sync(self, policy: Any, version: int) -> dict[str, float]:
        self._fail("sync", version)
        return self.backend.sync(policy, version)

    def close(self) -> None:
        self.backend.close()

    def _fail(self, verb: str, version: int) -> None:
        if (verb, version) == self.fails_at:
            raise BackendFailed("vllm server http://a:1 did not answer within 3 s")


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Trains the tiny model in this process, with a backend that fails (or not); the run's folder."""
    threads = torch.get_num_threads()

    def run(name: str, fails_at: tuple[str, int] | None = None, *, resume: bool = False) -> Path:
        folder = tmp_path / name
        recipe = make_recipe(
            tiny_model,
            data={"args": {"question": "compact"}, "train_size": 64, "eval_size": 4, "max_prompt_length": 32},
            rewards=[{"path": f"{ROOT}/tests/rewards_for_tests.py:share_of_small_numbers"}],
            rollout={"num_generations": 4, "max_completion_length": 8},
            scoring={"workers": 1},
            optimizer={"learning_rate": 1e-3},
            evaluation={"at_start": False},
            training={
                "output_dir": str(folder),
                "prompts_per_step": 2,
                "max_steps": STEPS,
                "num_threads": 1,
                "eval_every": 0,
                "save_every": 0,
            },
        )

        def make(recipe: Any, policy: Any) -> Any:
            backend = make_backend(recipe, policy)
            return FailingBackend(backend, *fails_at) if fails_at else backend

        monkeypatch.setattr(trainer, "make_backend", make)
        monkeypatch.setattr(trainer, "write_report_at_end", lambda folder: None)  # takes seconds
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            trainer.train(recipe, resume)
        finally:
            release_run_folder(folder)
        return folder

    yield run
    torch.set_num_threads(threads)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Logged metrics without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("time/", "step_time", "tokens_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(times)} for row in rows]


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "version", "steps"), [("generate", 2, 2), ("sync", 3, 3)])
def test_a_backend_that_fails_costs_no_step_that_was_made(
    run: Callable[..., Path], tmp_path: Path, verb: str, version: int, steps: int
) -> None:
    folder = tmp_path / "failing"
    with pytest.raises(BackendFailed) as failed:
        run("failing", (verb, version))
    assert str(failed.value) == (
        "vllm server http://a:1 did not answer within 3 s\n"
        f"saved {folder}/checkpoints/step_{steps:06d}; start again with --resume"
    )
    assert saved(folder) == [f"step_{steps:06d}"]
    assert [row["step"] for row in lines(folder)] == list(range(1, steps + 1))
    assert all({"reward", "grad_norm", "learning_rate"} <= row.keys() for row in lines(folder))
    assert (folder / f"rollouts/step_{steps:06d}.jsonl").exists()
    assert not (folder / "final").exists()

    run("failing", resume=True)
    undisturbed = run("undisturbed")
    assert lines(folder) == lines(undisturbed)
    weights, expected = (load_file(f / "final/model.safetensors") for f in (folder, undisturbed))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_backend_that_fails_in_an_evaluation_leaves_a_checkpoint_of_that_step(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(BackendFailed, match=r"saved .*/checkpoints/step_000004; start again with --resume$"):
        run("failing", ("generate", STEPS))
    assert saved(tmp_path / "failing") == ["step_000004"]


def test_a_backend_that_fails_before_the_first_step_saves_nothing(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match=r"^vllm server http://a:1 did not answer within 3 s$"):
        run("failing", ("sync", 0))
    assert not (tmp_path / "failing" / "checkpoints").exists()


COMPARES = """
def compares(completions, answer, **_):
    given = [text.rpartition("<answer>")[2].partition("</answer>")[0] for text in completions]
    return [float(one == right) for one, right in zip(given, answer)]
"""


@pytest.mark.slow
def test_before_weights_load_the_engine_is_looked_for_and_rewards_are_tried_on_right_answers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise MemoryError("weights")

    (tmp_path / "mine.py").write_text(COMPARES)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i} + 0", "answer": {i}}}\n' for i in range(20)))
    sections: dict[str, Any] = {
        "data": {"name": None, "path": f"{tmp_path}/rows.jsonl", "eval_size": 0, "max_prompt_length": 32},
        "rewards": [{"path": f"{tmp_path}/mine.py:compares"}],
        "rollout": {"num_generations": 4, "max_completion_length": 8},
        "scoring": {"workers": 1},
        "training": {"output_dir": f"{tmp_path}/run", "prompts_per_step": 4, "max_steps": 1, "num_threads": 1},
    }
    monkeypatch.setattr(trainer, "start_run", loads)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(MemoryError, match="weights"):
        trainer.train(make_recipe(tiny_model, **sections))
    assert "rewards[0] (compares): the right answers of 16 rows get 0 in every usual form" in caplog.text
    monkeypatch.setattr(trainer, "resolve_backend", lambda recipe, _: recipe.with_backend("vllm"))
    monkeypatch.setattr(trainer, "prepared", loads)
    monkeypatch.setattr(serve, "installed_version", lambda: None)
    with pytest.raises(UserError, match=r"rollout\.backend: vllm is not installed here"):
        trainer.train(make_recipe(tiny_model, **sections))
