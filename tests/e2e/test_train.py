"""Whole runs on one process: what they write, and that a bad start writes nothing. Those on several are in
``tests/processes``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.launching import run_python
from tests.resuming import command

pytestmark = pytest.mark.timeout(600)  # several launches each, on machines of any speed

TRL_NAMES = {
    *("reward", "reward_std", "frac_reward_zero_std", "loss", "entropy", "kl", "grad_norm", "learning_rate"),
    *("rewards/share_of_small_numbers/mean", "rewards/share_of_small_numbers/std", "num_tokens", "step_time"),
    *("completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"),
    *("completions/mean_terminated_length", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    *("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "tokens_per_second"),
    *("time/rollout", "time/score", "time/train", "time/sync", "step"),
}
SHORT = ("training.max_steps=3", "training.eval_every=0", "rollout.max_completion_length=8")


@pytest.mark.slow
def test_a_run_writes_what_it_promises(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_python(*command(tiny_model, folder, *SHORT, "training.dollars_per_hour=3.6"))
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert all(line.startswith(("INFO: ", "WARNING: ")) for line in said), "no library's warnings"
    assert len(said) == len(set(said)), "nothing is said twice"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "reward" in row]
    evaluation = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in training] == [1, 2, 3]
    assert [row["step"] for row in evaluation] == [0, 3]
    assert training[0].keys() >= TRL_NAMES | {"cost_usd"}
    assert all(isinstance(v, (int, float)) for row in rows for v in row.values())
    assert {"eval/accuracy_low", "eval/accuracy_high", "eval/completions/mean_length"} <= evaluation[0].keys()
    for name in ("recipe.yaml", "environment.json", "report.html", "curves.png", "checkpoints/step_000003"):
        assert (folder / name).exists(), name
    assert len((folder / "rollouts/step_000003.jsonl").read_text().splitlines()) == 16
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6]])).logits).all()
    card = (folder / "final/README.md").read_text()
    assert "| after (step 3) |" in card
    assert "- Cost of that time: $" in card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.num_generation=8", "num_generations"),
        ("rollout.num_generations=1", "num_generations"),
        ("rollout.num_generations=eight", "num_generations"),
        ("training.prompts_per_step=5", "num_minibatches"),
        ("model.name=no/such/folder/", "no/such/folder"),
        ("data.args.max_numbers=2", "max_numbers"),
        ("data.max_prompt_length=2", "max_prompt_length"),
        ("rewards.0.path=nowhere.py:f", "nowhere.py"),
    ],
)
def test_bad_input_is_one_message_exit_2_and_nothing_written(
    tiny_model: Path, tmp_path: Path, override: str, says: str
) -> None:
    folder = tmp_path / "run"
    done = run_python(*command(tiny_model, folder, override))
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not folder.exists()


@pytest.mark.slow
def test_a_corrupt_row_is_named_by_file_and_line(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"prompt": "1 2"}\n{"prompt": 3}\n{"prompt": "4 5"\n\xff\xfe\n{"question": "6"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {tiny_model}}}\ndata: {{path: {rows}, eval_size: 0}}\nrewards: [{{name: format}}]\n"
        f"training: {{output_dir: {tmp_path}/run, prompts_per_step: 1}}\n"
    )
    done = run_python("-m", "grpo", "train", recipe)
    assert done.returncode == 2
    for line in (2, 3, 4, 5):
        assert f"rows.jsonl:{line}" in done.stderr
    assert not (tmp_path / "run").exists()
