"""``grpo probe`` on recipes made to fail, each in its own way, and on recipes of ours that learn.

    python -m benchmarks.probe [--runs] [--cases NAME ...]

For each: what it says, whether that is right, and seconds as a whole. For ours also the share of groups with a signal
that it predicts, beside that of the first ten steps of a run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import hardware, print_table, versions

REWARDS = """
import itertools
import time
counted = itertools.count()
def one(completions, **_): return [1.0] * len(completions)
def zero(completions, **_): return [0.0] * len(completions)
def nothing(completions, **_): return [None if next(counted) % 2 else 1.0 for _ in completions]
def equal(completions, answer, **_): return [float(c.strip() == a) for c, a in zip(completions, answer)]
"""
BACKEND = """
from examples.my_backend import PlainBackend
class Shifted(PlainBackend):
    def completion(self, ids, logps): return super().completion(ids, [logp - 0.5 for logp in logps])
"""
ROWS = [{"prompt": f"{a} 3 9 = {a + 20}", "answer": a + 20} for a in range(1, 200)]


@dataclass(frozen=True)
class Case:
    """``says`` is the finding that is right; None where the recipe is to go."""

    says: str | None
    recipe: str
    overrides: list[str] = field(default_factory=list)


def cases(folder: Path, options: argparse.Namespace) -> dict[str, Case]:
    (folder / "rewards_of_probe.py").write_text(REWARDS)
    (folder / "backend_of_probe.py").write_text(BACKEND)
    texts = [{"prompt": row["prompt"], "tests": {"fn_name": "f", "inputs": [[1]], "outputs": [2]}} for row in ROWS]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def by(name: str) -> str:
        return f"{{path: '{folder}/rewards_of_probe.py:{name}'}}"

    hard = "data.args={question: compact, min_numbers: 3, max_numbers: 3, min_number: 1, max_number: 9"
    impossible = [f"{hard}, min_target: 200, max_target: 648}}", "data.eval_size=2"]  # for this model
    own_texts = [f"data={{path: {folder}/texts.jsonl, eval_size: 8, max_prompt_length: 32}}"]
    own_rows = [f"data={{path: {folder}/rows.jsonl, eval_size: 8, max_prompt_length: 32}}"]
    return {
        "nothing is paid": Case("no_signal", "smoke_cpu", [f"rewards=[{by('zero')}]"]),
        "everything is paid": Case("all_solved", "smoke_cpu", [f"rewards=[{by('one')}]"]),
        "no room to answer": Case("all_cut", "smoke_cpu", ["rollout.max_completion_length=6"]),
        "half is not scored": Case(
            "unscored", "smoke_cpu", [f"rewards=[{by('nothing')}]", "scoring.max_failure_rate=1.0"]
        ),
        "numbers beside texts": Case("gold_of_another_type", "smoke_cpu", [*own_rows, f"rewards=[{by('equal')}]"]),
        "always the same": Case("all_alike", "smoke_cpu", ["rollout.top_k=1"]),
        "form alone": Case(
            "signal_of_the_form_alone",
            "smoke_cpu",
            impossible,  # it pays a tenth for the form
        ),
        "too hard": Case("no_signal", "smoke_cpu", [*impossible, "rewards=[{name: countdown}]"]),
        "another sampler": Case(
            "sampler_mismatch", "smoke_cpu", [f"rollout.backend={folder}/backend_of_probe.py:Shifted"]
        ),
        "a form that it never saw": Case(
            "form_never_found",
            "smoke_cpu",
            [*own_texts, "rewards=[{name: code}]"],
        ),
        "smoke": Case(None, "smoke_cpu"),
        "demo": Case(None, "demo_cpu"),
        "word sums": Case(None, "word_sums_tiny_cpu", [f"model.name={options.word_sums}"]),
        "one liners": Case(None, "one_liners_tiny_cpu", [f"model.name={options.one_liners}"]),
        "SmolLM2": Case(None, "countdown_smollm2_cpu", [f"model.name={options.smollm2_sft}"]),
    }


def probed(case: Case, folder: Path) -> dict[str, Any]:
    """What probe said, and how long the command took."""
    command = [sys.executable, "-m", "grpo", "probe", case.recipe, *case.overrides, f"training.output_dir={folder}"]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode not in (0, 3):
        return {"right": False, "said": f"exit {done.returncode}: {done.stderr.strip()[-200:]}", "seconds": seconds}
    found = json.loads((folder / "probe.json").read_text())
    names = [finding["name"] for finding in found["findings"]]
    right = names == [] if case.says is None else case.says in names
    return {"right": right, "said": ", ".join(names) or "go", "seconds": seconds, "signal": found["with_signal"]}


def signal_of_first_steps(case: Case, folder: Path, steps: int = 10) -> float:
    command = [sys.executable, "-m", "grpo", "train", case.recipe, *case.overrides, f"training.output_dir={folder}"]
    short = [f"training.max_steps={steps}", "data.eval_size=8", "evaluation.at_start=false", "training.eval_every=0"]
    subprocess.run([*command, *short], check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = [1 - row["frac_reward_zero_std"] for row in rows if "frac_reward_zero_std" in row]
    return sum(shares) / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2-sft", default="runs/countdown_smollm2_sft_cpu/final")
    parser.add_argument("--word-sums", default="runs/word_sums_tiny_sft/final")
    parser.add_argument("--one-liners", default="runs/one_liners_tiny_sft/final")
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--runs", action="store_true", help="also train ten steps of those that go")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for place, (name, case) in enumerate(cases(Path(folder), options).items()):
            if options.cases and name not in options.cases:
                continue
            rows[name] = probed(case, Path(folder) / f"probe_{place}")
            if options.runs and case.says is None and rows[name]["right"]:
                rows[name]["first ten steps"] = signal_of_first_steps(case, Path(folder) / f"run_{place}")
            print(name, rows[name], flush=True)
    shown = {name: {key: str(row.get(key, "")) for key in ("right", "said", "seconds")} for name, row in rows.items()}
    print_table("what probe says", shown)
    print(json.dumps({"hardware": hardware(), "versions": versions(), "cases": rows}))


if __name__ == "__main__":
    main()
