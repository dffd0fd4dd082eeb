"""What one does with a run that did not go well: resume it with other values."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.errors import RunError, UserError
from tests.small_runs import lines, small_run

pytestmark = pytest.mark.slow


def test_a_run_that_went_to_nan_goes_on_with_a_lower_learning_rate(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As its last words advise."""
    folder = tmp_path / "run"
    training = {"output_dir": str(folder), "save_every": 2}

    def run(steps: int, rate: float, resume: bool = True) -> None:
        changes = {"optimizer": {"learning_rate": rate}, "training": training, "algorithm": {"num_minibatches": 2}}
        small_run(tiny_model, folder, monkeypatch, steps=steps, resume=resume, **changes)

    run(2, 1e-3, resume=False)
    with pytest.raises(RunError, match=r"resume from the last checkpoint with a lower optimizer\.learning_rate"):
        run(5, 1e38)
    caplog.clear()
    run(3, 1e-4)
    assert "optimizer.learning_rate: 0.001 -> 0.0001" in caplog.text
    assert [row["learning_rate"] for row in lines(folder)] == [1e-3, 1e-3, 1e-4]
    run(2, 1e-4)
    assert "nothing is left to train: the run is at step 3 of 2" in caplog.text


def test_a_recipe_that_another_run_had_is_refused_before_anything_changes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder's recipe.yaml is gone: checkpoints have theirs."""
    folder = tmp_path / "run"
    small_run(tiny_model, folder, monkeypatch, steps=1)
    (folder / "recipe.yaml").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"optimizer\.weight_decay: 0\.0 -> 0\.1"):
        small_run(tiny_model, folder, monkeypatch, steps=2, resume=True, optimizer={"weight_decay": 0.1})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
