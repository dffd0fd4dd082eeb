"""--resume never starts over where a run was further: no checkpoint verifies, one can't be read, or they are gone."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.run import manifest
from grpo.run.search import find_checkpoint, latest_checkpoint
from tests.run.test_checkpoint import save
from tests.small_runs import small_run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(checkpoint: Path, name: str = "model.safetensors") -> None:
    os.truncate(checkpoint / name, 10)


def write_run(folder: Path, steps: int, save_every: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"training: {{save_every: {save_every}}}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, steps + 1)))
    return folder


def test_where_none_verifies_each_is_listed_with_its_reason(tmp_path):
    folder = write_run(tmp_path / "run", 30, 10)
    for step in (10, 20, 30):
        save(folder / "checkpoints", step, keep=3)
    damage(folder / "checkpoints/step_000010")
    (folder / "checkpoints/step_000020/manifest.json").unlink()
    damage(folder / "checkpoints/step_000030", "manifest.json")
    before = contents(folder)
    with pytest.raises(UserError) as refusal:
        find_checkpoint(folder, True)
    first, *listed, last = str(refusal.value).splitlines()
    assert "none of the checkpoints" in first
    assert [line.split()[0] for line in listed] == ["step_000030", "step_000020", "step_000010"]
    assert "manifest.json is not readable" in listed[0]
    assert "manifest.json: No such file" in listed[1]
    assert "model.safetensors has 10 bytes instead of" in listed[2]
    assert "Nothing was changed" in last
    assert contents(folder) == before


def test_the_whole_start_of_such_a_run_changes_no_byte(tiny_model, tmp_path, monkeypatch):
    """Recipe, environment, metrics, rollouts and lock are what they were."""
    folder = tmp_path / "run"
    small_run(tiny_model, folder, monkeypatch, steps=1)
    good = contents(folder)
    damage(folder / "checkpoints/step_000001")
    before = contents(folder)
    assert good != before
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", ".lock"} <= before.keys()
    with pytest.raises(UserError, match=r"step_000001  model\.safetensors has 10 bytes"):
        small_run(tiny_model, folder, monkeypatch, steps=2, resume=True)
    assert contents(folder) == before


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOMEM, errno.ESTALE])
def test_an_error_of_the_system_is_no_damage(tmp_path, monkeypatch, code):
    """Else the run would go back to an older checkpoint, and delete the one that could not be read."""
    folder = write_run(tmp_path / "run", 30, 10)
    for step in (10, 20):
        save(folder / "checkpoints", step)
    newest = folder / "checkpoints/step_000020"
    read = manifest.sha256

    def failing(path: Path) -> str:
        if path == newest / "model.safetensors":
            raise OSError(code, os.strerror(code), str(path))
        return read(path)

    monkeypatch.setattr(manifest, "sha256", failing)
    says = f"step_000020  could not be read: model.safetensors: {os.strerror(code)}"
    for look in (lambda: find_checkpoint(folder, True), lambda: latest_checkpoint(folder / "checkpoints")):
        with pytest.raises(UserError, match=says) as refusal:
            look()
        assert "That is no damage" in str(refusal.value)
        assert f"--resume-from {folder}/checkpoints/step_000010" in str(refusal.value)
    with pytest.raises(UserError, match=f"could not be read: model.safetensors: {os.strerror(code)}"):
        find_checkpoint(folder, str(newest))
    monkeypatch.undo()
    assert find_checkpoint(folder, True) == newest


def test_a_real_one_is_none_either(tmp_path):
    folder = write_run(tmp_path / "run", 10, 10)
    file = save(folder / "checkpoints", 10) / "optimizer.pt"
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(UserError, match=r"could not be read: optimizer\.pt: Too many levels of symbolic links"):
        find_checkpoint(folder, True)


def test_what_is_not_there_was_lost(tmp_path):
    """Links to a disk that is gone: of one checkpoint, and of all."""
    folder = write_run(tmp_path / "run", 10, 10)
    root = folder / "checkpoints"
    root.mkdir()
    (root / "step_000010").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"step_000010  manifest\.json: No such file"):
        find_checkpoint(folder, True)
    (root / "step_000010").unlink()
    root.rmdir()
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"cannot look for checkpoints in .*: No such file"):
        find_checkpoint(folder, True)


def test_a_run_that_must_have_had_a_checkpoint_does_not_start_over(tmp_path):
    folder = write_run(tmp_path / "run", 11, 10)
    before = contents(folder)
    with pytest.raises(UserError, match="rollouts of 11 steps, with a checkpoint every 10, but no checkpoint"):
        find_checkpoint(folder, True)
    assert contents(folder) == before
    (folder / "rollouts").mkdir()
    (folder / "metrics.jsonl").rename(folder / "rollouts/step_000012.jsonl")
    with pytest.raises(UserError, match="metrics or rollouts of 12 steps, with a checkpoint every 10"):
        find_checkpoint(folder, True)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"of 12 steps, and no recipe\.yaml that says how often it was saved"):
        find_checkpoint(folder, True)
    finished = write_run(tmp_path / "finished", 5, 0)
    (finished / "final").mkdir()
    assert find_checkpoint(finished, True) is None
    (finished / "final/config.json").write_text("{}")
    with pytest.raises(UserError, match="final, which is the end of a run, but no checkpoint"):
        find_checkpoint(finished, True)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over_and_says_so(tmp_path, caplog):
    """In the step that saves it, at the latest."""
    for steps, save_every in ((10, 10), (40, 0), (0, 1)):
        folder = write_run(tmp_path / f"{steps}", steps, save_every)
        (folder / "checkpoints/step_000010.tmp").mkdir(parents=True)
        assert find_checkpoint(folder, True) is None
        assert f"no checkpoint in {folder}/checkpoints yet, starting at step 0" in caplog.text
