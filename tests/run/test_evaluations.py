"""``eval/NAME.json`` says what an accuracy depends on, in counts that can be checked, and nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo.errors import RunError
from grpo.evaluation.statistics import accuracy_metrics
from grpo.run.evaluations import write_evaluation
from tests.conftest import make_recipe

REWARDS: dict[int, list[float | None]] = {3: [0.99, 0.0], 5: [1.0, 2.0], 7: [None, 1.0]}


def rows_of(rewards: dict[int, list[float | None]]) -> list[dict[str, Any]]:
    return [
        {
            "step": 0,
            "prompt_id": prompt,
            "sample": sample,
            "prompt": f"q{prompt}",
            "completion": "a \x1b[31m\udc80",
            "status": "length" if reward is None else "stop",
            "rewards": {"countdown": reward},
        }
        for prompt, values in rewards.items()
        for sample, reward in enumerate(values)
    ]


def write(folder: Path, name: str | None = None, model: str = "runs/x/final", **sections: Any) -> Path:
    recipe = make_recipe(Path("unused"), rewards=[{"name": "countdown"}], **sections)
    metrics = accuracy_metrics(np.array([[False, False], [True, True]]), ["q3", "q5"])
    return write_evaluation(folder, name, recipe, model, metrics, rows_of(REWARDS))


def test_counts_and_settings_are_those_of_the_samples_beside_it(tmp_path: Path) -> None:
    file = write(tmp_path / "eval", evaluation={"num_generations": 2, "temperature": 0.7}, training={"seed": 11})
    facts = json.loads(file.read_text())
    samples = [json.loads(line) for line in (file.parent / facts["samples"]).read_text().splitlines()]
    assert len(samples) == facts["counts"]["completions"] == 6
    assert facts["counts"]["prompts"] == 3
    assert facts["counts"]["scored_prompts"] == 2
    assert facts["counts"]["solved"] == 2 == facts["accuracy"] * 4
    assert facts["counts"]["statuses"] == {"length": 1, "stop": 5}
    assert facts["interval"]["low"] < 0.5 < facts["interval"]["high"]
    assert facts["interval"]["method"] == "clustered by question"
    sampling = facts["sampling"]
    assert (sampling["temperature"], sampling["seed"], sampling["num_generations"]) == (0.7, 11, 2)
    assert {"torch", "transformers"} <= facts["environment"]["packages"].keys()
    assert facts["model"] == "runs/x/final"


def test_files_are_called_after_the_model_and_none_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "final"
    folder.mkdir()
    assert write(tmp_path, model=str(folder)).name == "final.json"
    before = (tmp_path / "final.json").read_bytes()
    assert write(tmp_path, model=str(folder)).name == "final-2.json"
    assert (tmp_path / "final.json").read_bytes() == before
    assert write(tmp_path, model="Qwen/Qwen2.5-0.5B").name == "Qwen-Qwen2.5-0.5B.json"
    assert write(tmp_path, "../../greedy").name == "greedy.json"
    assert (tmp_path / "greedy.json").exists(), "a name leads nowhere else"


def test_a_secret_of_the_task_is_left_out(tmp_path: Path) -> None:
    text = write(tmp_path, data={"args": {"api_key": "sk-abcdefghijklmnopqrst"}}).read_text()
    assert "sk-abcdef" not in text


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="the evaluation can't be written"):
        write(tmp_path / "file")
