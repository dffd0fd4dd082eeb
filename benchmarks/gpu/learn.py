"""A real run that learns, with the trainer as users start it: accuracy before and after.

    python -m benchmarks.gpu.learn tiny [--device cpu]
    python -m benchmarks.gpu.learn smollm2 --model FOLDER_OR_GGUF

``tiny`` is recipes/demo_cpu.yaml. ``smollm2`` is recipes/countdown_smollm2_sft_cpu.yaml, then
countdown_smollm2_cpu.yaml with more prompts a step. On a GPU both compute in bfloat16. On a CPU each takes one step, to
see that it runs. Rows come from files, so that `datasets` need not be installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT
from grpo.run.read import read_run

RUNS: dict[str, list[tuple[str, dict[str, Any]]]] = {  # recipes one after another, with what a GPU changes
    "tiny": [("demo_cpu", {"training.max_seconds": 30})],
    "smollm2": [
        ("countdown_smollm2_sft_cpu", {"training.max_seconds": 15, "training.micro_batch_tokens": 8192}),
        (
            "countdown_smollm2_cpu",
            {
                "training.prompts_per_step": 16,
                "training.max_steps": 40,
                "training.max_seconds": 30,
                "training.micro_batch_tokens": 16384,
                "training.save_every": 0,
            },
        ),
    ],
}
ON_CPU = {
    "training.max_steps": 1,
    "training.prompts_per_step": 2,
    "training.micro_batch_tokens": 512,
    "training.save_every": 0,
    "data.eval_size": 4,
    "rollout.num_generations": 2,
}


SHORT_ON_CPU = {"countdown_smollm2_cpu": {"rollout.max_completion_length": 24}}


def write_rows(data: dict[str, Any], split: str, size: int | None, folder: Path) -> Path:
    """The rows of a recipe's generated task, as a file."""
    rows = importlib.import_module(f"data.{data['name']}").rows(split, size, **data.get("args", {}))
    file = folder / f"{data['name']}_{split}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def train(recipe: str, changes: dict[str, Any], folder: Path) -> Path:
    """Run a recipe of ours to its end; returns the run's folder."""
    path, output = ROOT / "recipes" / f"{recipe}.yaml", folder / recipe
    data = yaml.safe_load(path.read_text())["data"]
    eval_size = changes.get("data.eval_size", data["eval_size"])
    settings = changes | {
        "data.name": "null",
        "data.args": "{}",
        "data.train_size": "null",
        "data.path": write_rows(data, "train", data.get("train_size"), folder),
        "data.eval_path": write_rows(data, "eval", eval_size, folder),
        "rollout.backend": "hf",
        "training.output_dir": output,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-m", "grpo", "train", str(path), *overrides], cwd=ROOT, check=True)
    return output


def summary(folder: Path) -> dict[str, Any]:
    """A run's accuracies with their intervals, its first and last rewards, and its speed."""
    record = read_run(folder)
    accuracies = [
        [row["eval/accuracy"], row["eval/accuracy_low"], row["eval/accuracy_high"]] for row in record.evaluation
    ]
    steps, few = record.training, max(1, len(record.training) // 4)
    rewards = [row["reward"] for row in steps]
    times = sorted(row["step_time"] for row in steps)
    return {
        "accuracy": [accuracies[0], accuracies[-1]],
        "learned": accuracies[-1][1] > accuracies[0][0],
        "reward": [sum(rewards[:few]) / few, sum(rewards[-few:]) / few],
        "steps": len(steps),
        "step_s": times[len(times) // 2],
        "tokens_per_s": max(row["tokens_per_second"] for row in steps),
        "sampling_logp_difference": steps[-1].get("sampling/sampling_logp_difference/mean"),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=list(RUNS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", help="of smollm2: a folder or a GGUF file")
    options = parser.parse_args(arguments)
    if options.which == "smollm2" and not options.model:
        print(json.dumps({"left_out": "SMOLLM2 names no weights"}))
        return
    model = Path(options.model).resolve() if options.model else None
    with tempfile.TemporaryDirectory() as name:
        for recipe, on_gpu in RUNS[options.which]:
            short = ON_CPU | SHORT_ON_CPU.get(recipe, {})
            changes = short if options.device == "cpu" else on_gpu | {"model.dtype": "bfloat16"}
            if model is not None:
                changes["model.name"] = model
            folder = train(recipe, changes, Path(name))
            model = folder / "final"
        print(json.dumps(summary(folder)))


if __name__ == "__main__":
    main()
