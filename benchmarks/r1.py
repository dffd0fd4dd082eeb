"""R1 in miniature: the chain recipes/chains/r1_tiny_cpu.yaml, and R1-Zero's path from the same base in as many seconds.

    python -m benchmarks.r1 [--seeds 0 1] [--output runs/r1]

Seeds run at once, a core each. Within a seed the chain comes first. Its seconds, those of every stage's process with
start-up and sampling and without measuring, are then R1-Zero's seconds of training alone. Start the command again after
an interruption: it goes on.

Writes OUTPUT/summary.json and prints it as the last line: ``stages`` has accuracy, length, form and seconds of each,
means over the seeds, and each seed's own with intervals; ``orderings`` compares stages on the same tasks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import ROOT
from grpo.evaluation.statistics import Paired, paired_test

CHAIN, ZERO = "r1_tiny_cpu", "r1_zero_tiny_cpu"
FIGURES = ("accuracy", "length", "form", "seconds")
Row = Mapping[str, Any]
Outcomes = Mapping[str, float]  # by task

ORDERINGS = (
    ("rl solves more than cold", "accuracy", "rl", "cold", "above"),
    ("again solves no less than rl", "accuracy", "again", "rl", "kept"),
    ("again is better formed than rl", "form", "again", "rl", "above"),
    ("rl2 solves more than zero", "accuracy", "rl2", "zero", "above"),
)
"""What should be seen: the words, what is compared, of which two stages, and how (``holds``)."""
REWARD_OF = {"accuracy": "countdown", "form": "form"}  # in evaluation.jsonl, 1 or 0


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


def paired(one: Outcomes, other: Outcomes) -> Paired:
    """The one stage less the other, on the same tasks. Raises ValueError where they are not the same."""
    if one.keys() != other.keys():
        raise ValueError("the two stages were measured on different tasks")
    tasks = list(one)
    return paired_test([other[task] for task in tasks], [one[task] for task in tasks], tasks)


def holds(how: str, found: Paired) -> bool:
    """``above``: the whole interval of the difference is above 0. ``kept``: not the whole of it is below 0."""
    return found.low > 0 if how == "above" else found.high >= 0


def outcomes(stage: Path, reward: str) -> dict[str, float]:
    """What ``reward`` paid for each held-out task when the stage's model was measured."""
    with (stage / "evaluation.jsonl").open(encoding="utf-8") as lines:
        return {row["prompt"]: row["rewards"][reward] for row in map(json.loads, lines)}


def compared(output: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Each ordering, with the difference in every seed and whether it holds there."""
    found = []
    for words, figure, one, other, how in ORDERINGS:
        by_seed = []
        for seed in seeds:
            paid = [
                outcomes(output / f"{'zero' if stage == 'zero' else 'chain'}_seed{seed}" / stage, REWARD_OF[figure])
                for stage in (one, other)
            ]
            found_here = paired(*paid)
            by_seed.append({"seed": seed, **asdict(found_here), "holds": holds(how, found_here)})
        found.append({"ordering": words, "figure": figure, "by_seed": by_seed})
    return found


def stages_of(rows_of: Mapping[int, Sequence[Row]]) -> list[dict[str, Any]]:
    """Means over the seeds, stage by stage, and each seed's own row."""
    stages = []
    for rows in zip(*rows_of.values(), strict=True):
        values = {name: [row[name] for row in rows] for name in FIGURES}
        means = {name: None if None in of_name else round(fmean(of_name), 4) for name, of_name in values.items()}
        by_seed = [{"seed": seed, **row} for seed, row in zip(rows_of, rows, strict=True)]
        stages.append({"name": rows[0]["name"], **means, "by_seed": by_seed})
    return stages


def table(summary: Mapping[str, Any]) -> str:
    """A row a stage and seed, then one an ordering and seed: for a terminal and for docs/results/r1.md."""
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
    lines += ["", "| | seed | difference | p | holds |", "|---|---|---|---|---|"]
    for ordering in summary["orderings"]:
        for row in ordering["by_seed"]:
            interval = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            what = f"{ordering['ordering']} ({ordering['figure']})"
            lines.append(
                f"| {what} | {row['seed']} | {interval} | {row['p']:.2g} | {'yes' if row['holds'] else 'no'} |"
            )
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
    summary = {
        "chain": CHAIN,
        "seeds": options.seeds,
        "stages": stages_of({seed: found[seed] for seed in options.seeds}),
        "orderings": compared(options.output, options.seeds),
    }
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(summary)}\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
