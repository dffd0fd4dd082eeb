"""A real chain of the tiny model in this process: interrupted again and again it ends with the same bytes.

Killed processes of a longer one are in tests/processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from grpo import sft
from grpo.cli.main import app
from grpo.pipeline import chain as chain_module
from grpo.pipeline.chain import run_chain
from grpo.pipeline.chain_file import load_chain
from grpo.run.folder import _held, release_run_folder

CHAIN = """\
output_dir: {folder}
stages:
  cold:
    kind: sft
    recipe: tiny_base_sft_cpu
    overrides: &short
      model.name: data/tiny_base
      data: {{train_size: 16, eval_size: 0}}
      training: {{prompts_per_step: 4, max_steps: 1, eval_every: 0, save_every: 1, num_threads: 1}}
  sampled:
    kind: sample
    recipe: smoke_cpu
    from: cold
    n: 6
    prompts: 8
    keep: correct,shortest=1
    overrides: {{training.num_threads: 1, scoring.workers: 1, data.eval_size: 8}}
  again:
    kind: sft
    recipe: tiny_base_sft_cpu
    from: cold
    rows: sampled
    overrides: {{<<: *short, data: {{eval_size: 0}}, training: {{prompts_per_step: 2, max_steps: 1, num_threads: 1}}}}
"""


class Killed(BaseException):
    """Raised where a process would be killed."""


def command_here(command: list[str], what: str, tick: Callable[[], None] = lambda: None) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert app(command[3:], standalone_mode=False) in (None, 0)
    finally:
        for folder in list(_held):
            if folder.name == "run":
                release_run_folder(folder)
        torch.set_num_threads(1)


def deadly_after(moment: int) -> Callable[[int], None]:
    """An fsync that is the process's last, the ``moment``-th time."""
    fsync, left = os.fsync, [moment]

    def deadly(descriptor: int) -> None:
        fsync(descriptor)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return deadly


def result(folder: Path) -> dict[str, bytes]:
    files = [folder / "cold/run/final/model.safetensors", folder / "again/run/final/model.safetensors"]
    files += [folder / "sampled" / name for name in ("rows.jsonl", "rows.samples.jsonl", "rows.report.json")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.slow
def test_a_chain_that_is_interrupted_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module.child, "run", command_here)
    monkeypatch.setattr(sft, "write_report_at_end", lambda folder: None)  # takes seconds
    folders = {name: tmp_path / name for name in ("undisturbed", "interrupted")}
    for name, folder in folders.items():
        (tmp_path / f"{name}.yaml").write_text(CHAIN.format(folder=folder))
    run_chain(load_chain(str(tmp_path / "undisturbed.yaml")))

    interrupted = load_chain(str(tmp_path / "interrupted.yaml"))
    for moment in (9, 5):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", deadly_after(moment))
            with pytest.raises(Killed):
                run_chain(interrupted)
    run_chain(interrupted)
    assert result(folders["interrupted"]) == result(folders["undisturbed"])
