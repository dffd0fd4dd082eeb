"""The model card says what was measured and nothing else, and its front matter is YAML that a hub takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.config import Recipe
from grpo.config.yaml_text import dump
from grpo.report.card import card_at_end, is_hub_id, model_card

RECIPE: dict[str, Any] = {
    "stage": "grpo",
    "model": {"name": "Qwen/Qwen2.5-0.5B", "lora": {"r": 8}},
    "data": {"hub": "openai/gsm8k", "template": "r1_zero"},
    "rewards": [{"name": "math"}, {"path": "/home/me/secret_project/mine.py:fn", "weight": 0.5}],
    "optimizer": {"learning_rate": 2e-6},
    "training": {"output_dir": "/home/me/runs/x", "max_steps": 20, "dollars_per_hour": 2.5, "seed": 3},
}
ENVIRONMENT = {
    "packages": {"torch": "2.13.0", "transformers": "5.19.0", "wandb": "1"},
    "gpus": [{"name": "NVIDIA H100", "memory_gb": 79.6}],
    "python": "3.11.9",
    "host": "a-host-of-mine",
    "directory": "/home/me",
    "source": {"commit": "0123456789abcdef", "modified": False},
}


def a_run(folder: Path, *, evaluated: bool = True, environment: Any = ENVIRONMENT, **sections: Any) -> Path:
    (folder / "rollouts").mkdir(parents=True)
    resolved = Recipe.model_validate({**RECIPE, **sections}).model_dump(mode="json")
    (folder / "recipe.yaml").write_text(dump(resolved), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment))
    lines: list[dict[str, float]] = [
        {"step": step, "reward": 0.1, "num_tokens": 1000.0 * step, "step_time": 90.0, "cost_usd": 0.0625 * step}
        for step in range(1, 21)
    ]
    for step, accuracy in ((0, 0.25), (20, 0.5)) if evaluated else ():
        bounds = {"eval/accuracy_low": accuracy - 0.0625, "eval/accuracy_high": accuracy + 0.0625}
        lines.append({"step": step, "eval/accuracy": accuracy, "eval/completions/mean_length": 40.0 + step} | bounds)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def parts(card: str) -> tuple[dict[str, Any], str]:
    found = re.fullmatch(r"---\n(.*?)---\n(.*)", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1]), found[2]


def test_front_matter_names_what_a_hub_has_and_no_license(tmp_path: Path) -> None:
    front, _ = parts(model_card(a_run(tmp_path / "x")))
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen2.5-0.5B",
        "datasets": ["openai/gsm8k"],
        "tags": ["grpo-train", "grpo", "lora"],
    }
    from huggingface_hub import ModelCard

    assert ModelCard(model_card(tmp_path / "x")).data.base_model == "Qwen/Qwen2.5-0.5B"


def test_the_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    run = a_run(tmp_path / "x")
    rows = [{"step": 20, "prompt_id": i, "sample": 0} for i in range(37)]
    (run / "rollouts/eval_000020.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, text = parts(model_card(run))
    assert "| before (step 0) | 0.250 | 0.188 to 0.312 |" in text
    assert "| after (step 20) | 0.500 | 0.438 to 0.562 |" in text
    assert "\n37 tasks, 1 completion each, temperature 1, at most 512 tokens." in text
    assert "- Steps: 20\n" in text
    assert "- Tokens of prompts and completions: 20,000\n" in text
    assert "- Time in training steps: 30m00s (" in text
    assert "$1.25, at $2.5 an hour" in text
    assert "NVIDIA H100 (79.6 GB)" in text
    assert "torch 2.13.0, transformers 5.19.0" in text
    assert "learning_rate: 2.0e-06" in text
    assert "num_generations" not in text.partition("## Recipe")[2], "a default"


def test_nothing_of_this_machine_is_in_it(tmp_path: Path) -> None:
    card = model_card(a_run(tmp_path / "x", model={"name": "/home/me/secret_project/base"}))
    assert "/home/me" not in card
    assert "a-host-of-mine" not in card
    assert "mine.py:fn" in card
    assert "base_model" not in parts(card)[0]


def test_what_was_not_measured_is_said_and_not_invented(tmp_path: Path) -> None:
    plain = {**RECIPE["training"], "dollars_per_hour": None}
    run = a_run(tmp_path / "x", evaluated=False, environment={}, training=plain)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key != "cost_usd"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    card = model_card(run)
    assert "accuracy was not measured" in card
    assert "Cost" not in card
    assert "Where it ran" not in card


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    name = "x\n---\nlicense: mit\n<script>alert(1)</script>|```\x1b[2J"
    run = a_run(tmp_path / "x", tracking={"run_name": name}, data={"path": "a`b\n# c.jsonl"})
    front, text = parts(model_card(run))
    assert "license" not in front
    assert "\x1b" not in text
    before, _, recipe = text.partition("```yaml\n")
    assert "<script>" not in before.replace("\\<script\\>", "")
    assert "\n# c" not in before
    assert recipe.count("```") == 1


def test_a_card_that_cannot_be_made_costs_a_line_and_no_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert card_at_end(tmp_path / "final") is None
    assert "final has no model card" in caplog.text


def test_the_card_of_the_best_model_says_by_what_and_of_which_step_it_is(tmp_path: Path) -> None:
    run = a_run(tmp_path / "x", training=RECIPE["training"] | {"save_best": "eval/accuracy"})
    best, final = card_at_end(run / "best"), card_at_end(run / "final")
    says = "the run's best model by `eval/accuracy`, that of step 20; the run went on after it"
    assert best
    assert final
    assert says in best
    assert says not in final
    assert best.replace(f"It is {says}.\n\n", "") == final


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Qwen/Qwen2.5-3B", True), ("data/tiny_base", False), ("runs/x/final", False), ("./a/b", False), ("gpt2", False),
     ("/a/b", False), ("models/x", False), ("me/x.gguf", False)],
)  # fmt: skip
def test_only_a_name_that_can_be_a_hubs_is_a_base_model(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected
