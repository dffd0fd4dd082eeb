"""R1 in miniature: the chain recipes/chains/r1_tiny_cpu.yaml, and R1-Zero's path from the same base in as many seconds.

    python -m benchmarks.r1 [--seeds 0 1] [--output runs/r1]

Seeds run at once, a core each. Within a seed the chain comes first. Its seconds, those of every stage's process with
start-up and sampling and without measuring, are then R1-Zero's seconds of training alone. Start the command again after
an interruption: it goes on.

Writes OUTPUT/summary.json and prints it as the last line: ``stages`` has accuracy, length, form and seconds of each,
means over the seeds, and each seed's own with intervals; ``holds`` says in which seeds each ordering holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import ROOT

CHAIN, ZERO = "r1_tiny_cpu", "r1_zero_tiny_cpu"
FIGURES = ("accuracy", "length", "form", "seconds")
Row = Mapping[str, Any]

ORDERINGS = {
    "rl over cold": lambda of: of["rl"]["accuracy_low"] > of["cold"]["accuracy_high"],
    "again keeps what rl found": lambda of: of["again"]["accuracy_high"] >= of["rl"]["accuracy"],
    "again is better formed than rl": lambda of: of["again"]["form_low"] > of["rl"]["form_high"],
    "rl2 over zero": lambda of: of["rl2"]["accuracy_low"] > of["zero"]["accuracy_high"],
}
"""Over: the 95% intervals do not meet. Keeps: the interval does not lie below."""


def run_chain(name: str, folder: Path, seed: int, *overrides: str) -> dict[str, Any]:
    """``grpo run``, its lines with the seed before them; the chain's summary. Raises SystemExit where it fails."""
    command = ["grpo", "run", name, f"output_dir={json.dumps(str(folder))}", f"seed={seed}", *overrides]
    with subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(f"seed {seed} | {line}", end="", flush=True)
    if process.returncode:
        sys.exit(f"{folder}: the chain ended with exit code {process.returncode}; start again to go on from there")
    return json.loads((folder / "summary.json").read_bytes())


def run_seed(seed: int, output: Path) -> list[dict[str, Any]]:
    """The chain's stages, and after them R1-Zero's path of as many seconds."""
    chain = run_chain(CHAIN, output / f"chain_seed{seed}", seed)
    given = f"stages.zero.overrides.training.max_seconds={chain['seconds']}"
    zero = run_chain(ZERO, output / f"zero_seed{seed}", seed, given)
    return [*chain["stages"], *zero["stages"]]


def summary_of(stages_of: Mapping[int, Sequence[Row]]) -> dict[str, Any]:
    """Means over the seeds, stage by stage, and which orderings hold in which."""
    stages = []
    for rows in zip(*stages_of.values(), strict=True):
        means = {
            name: None if None in (values := [row[name] for row in rows]) else round(fmean(values), 4)
            for name in FIGURES
        }
        by_seed = [{"seed": seed} | dict(row) for seed, row in zip(stages_of, rows, strict=True)]
        stages.append({"name": rows[0]["name"], **means, "by_seed": by_seed})
    holds = {}
    for name, ordering in ORDERINGS.items():
        named = {seed: {row["name"]: row for row in rows} for seed, rows in stages_of.items()}
        holds[name] = [seed for seed, of in named.items() if ordering(of)]
    return {"chain": CHAIN, "seeds": list(stages_of), "stages": stages, "holds": holds}


def table(summary: Mapping[str, Any]) -> str:
    """A row a stage and seed, for a terminal and for docs/results/r1.md."""
    lines = ["| stage | seed | accuracy | length | form | seconds |", "|---|---|---|---|---|---|"]
    for stage in summary["stages"]:
        for row in stage["by_seed"]:
            cells = [stage["name"], str(row["seed"])]
            if row["accuracy"] is None:
                cells += [f"{row.get('rows', 0):,} rows kept", "", ""]
            else:
                cells += [
                    f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]",
                    f"{row['length']:.0f}",
                    f"{row['form']:.3f} [{row['form_low']:.3f}, {row['form_high']:.3f}]",
                ]
            lines.append(f"| {' | '.join([*cells, format(row['seconds'], '.0f')])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.r1", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="one process each, all at once")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/r1")
    options = parser.parse_args()
    found: dict[int, list[dict[str, Any]]] = {}

    def work(seed: int) -> None:
        found[seed] = run_seed(seed, options.output.resolve())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in options.seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if missing := [seed for seed in options.seeds if seed not in found]:
        sys.exit(f"seed {missing[0]} failed: its lines above say why; start again to go on from there")
    summary = summary_of({seed: found[seed] for seed in options.seeds})
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(summary)}\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
