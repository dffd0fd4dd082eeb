"""``grpo plan`` beside the runs that it speaks of: peak memory and seconds a step, on this machine's CPU.

    python -m benchmarks.plan [--model models/smollm2-135m] [--cases smoke demo ...]

Each case is trained for a few steps. Then ``grpo plan`` says what it expects, with the lengths and the share of groups
with a signal that the run had: those are what a plan can't know. Seconds are the median of all steps but the first,
which compiles; memory is the training process's largest (VmHWM). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import hardware, median, print_table, versions
from grpo.config import Recipe
from grpo.config.load import load_recipe

SMOLLM2 = ["evaluation.at_start=false", "data.eval_size=8"]
CASES: dict[str, tuple[str, list[str]]] = {
    "smoke": ("smoke_cpu", ["training.max_steps=12"]),
    "demo": ("demo_cpu", ["training.max_steps=5", "data.eval_size=64"]),
    "word sums": ("word_sums_tiny_cpu", ["model.name=WORD_SUMS", "training.max_steps=5", "data.eval_size=64"]),
    "SFT, tiny": ("tiny_base_sft_cpu", ["training.max_steps=30", "model.name=data/tiny_base"]),
    "SmolLM2": ("countdown_smollm2_cpu", ["model.name=SMOLLM2", "training.max_steps=3", *SMOLLM2]),
    "SmolLM2, LoRA": (
        "countdown_smollm2_cpu",
        ["model.name=SMOLLM2", "model.lora={r: 16}", "training.max_steps=3", *SMOLLM2],
    ),
    "SmolLM2, SFT": ("countdown_smollm2_sft_cpu", ["model.name=SMOLLM2", "training.max_steps=5", "data.eval_size=8"]),
}


def train(recipe: str, overrides: list[str], folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Peak memory in bytes, and the metrics of the steps. Raises RuntimeError where the run fails."""
    command = [sys.executable, "-m", "grpo", "train", recipe, *overrides, f"training.output_dir={folder}"]
    with (folder.parent / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        peak = 0.0
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                peak = max(peak, _peak_bytes(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{_tail(folder.parent / 'log.txt')}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return peak, [row for row in rows if "step_time" in row]


def _peak_bytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def planned(recipe: str, overrides: list[str], lengths: dict[str, float]) -> dict[str, Any]:
    options = [f"--{name}={value}" for name, value in lengths.items()]
    command = [sys.executable, "-m", "grpo", "plan", recipe, *overrides, "--json", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def lengths_of(steps: list[dict[str, Any]], recipe: Recipe) -> dict[str, float]:
    """What a plan can't know, as the options of ``grpo plan`` name it: means over all steps but the first."""
    P, G = recipe.training.prompts_per_step, recipe.rollout.num_generations if recipe.stage == "grpo" else 1
    count = len(steps) - 1
    completion = sum(step["tokens_per_second"] * step["step_time"] for step in steps[1:]) / (count * P * G)
    both = (steps[-1]["num_tokens"] - steps[0]["num_tokens"]) / (count * P * G)
    found = {"length": round(completion, 1), "prompt-length": round(max(both - completion, 1.0), 1)}
    if recipe.stage == "grpo":
        found["signal"] = round(1 - sum(step["frac_reward_zero_std"] for step in steps[1:]) / count, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="SmolLM2-135M")
    parser.add_argument("--word-sums", default="runs/word_sums_tiny_sft/final", help="the base of word sums")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = {}
    for name in options.cases:
        recipe, overrides = CASES[name]
        overrides = [o.replace("SMOLLM2", options.model).replace("WORD_SUMS", options.word_sums) for o in overrides]
        with tempfile.TemporaryDirectory() as folder:
            peak, steps = train(recipe, overrides, Path(folder) / "run")
            lengths = lengths_of(steps, load_recipe(str(Path(folder) / "run" / "recipe.yaml"), []))
            plan = planned(recipe, overrides, lengths)
        seconds = median([step["step_time"] for step in steps[1:]])
        rows[name] = {
            "MB": peak / 1e6,
            "MB planned": plan["peak_bytes"] / 1e6,
            "ratio of MB": plan["peak_bytes"] / peak,
            "s a step": seconds,
            "s planned": plan["step_seconds"],
            "ratio of s": plan["step_seconds"] / seconds,
        }
        print_table(name, {name: rows[name]})
    print_table("planned beside measured", rows)
    print(json.dumps({"hardware": hardware(), "versions": versions(), "cases": rows}))


if __name__ == "__main__":
    main()
