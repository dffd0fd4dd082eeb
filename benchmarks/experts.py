"""What keeps experts' loads even: the tiny mixture's supervised start with nothing, with the bias, with the loss.

    python -m benchmarks.experts [--steps 300] [--report]

Trains `recipes/moe_tiny_sft_cpu.yaml` three times, one process after the other; finished runs are kept. Prints a table
and draws docs/results/moe_balance.png. `--report` does only that, from the runs that there are.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.common import ROOT
from data.tiny import write_tiny_model
from grpo.report.drawing import LIGHT, STYLE, dress
from grpo.report.smoothing import smooth
from grpo.run.read import RunRecord, read_run

RECIPE = "recipes/moe_tiny_sft_cpu.yaml"
MODEL = Path("models/tiny_moe_untrained")
RUNS = Path("runs/experts")
PICTURE = ROOT / "docs/results/moe_balance.png"
VARIANTS = {
    "nothing": {"router_bias_update_rate": 0.0},
    "bias 0.001": {"router_bias_update_rate": 0.001},
    "bias 0.01": {"router_bias_update_rate": 0.01},
    "loss 0.01": {"router_bias_update_rate": 0.0, "router_aux_loss_coef": 0.01},
}
CURVES = {"router/max_load": "busiest expert's load over the mean", "router/dead_experts": "share of experts unused"}
CURVES |= {"eval/loss": "held-out loss, nats a token"}


def train(name: str, steps: int) -> None:
    folder = RUNS / name.replace(" ", "_")
    if (folder / "final").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"algorithm.{key}={value}" for key, value in VARIANTS[name].items()]
    settings += [f"training.output_dir={folder}", f"training.max_steps={steps}"]
    subprocess.run([sys.executable, "-m", "grpo", "train", RECIPE, *settings], check=True)


def draw(runs: dict[str, RunRecord]) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(CURVES), 3.0), dpi=140, layout="constrained", facecolor=LIGHT.paper)
        for ax, (metric, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
            dress(ax, LIGHT)
            for colour, (name, run) in zip(LIGHT.series, runs.items(), strict=False):
                steps, values = run.series(metric)
                ax.plot(steps, smooth(values), color=colour, label=name)
            ax.set_title(title, loc="left", fontsize=10)
            ax.set_xlabel("step", loc="right")
            ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=8)
        figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if not arguments.report:
        if not MODEL.exists():
            write_tiny_model(MODEL, arch="deepseek_v3")
        for name in VARIANTS:
            train(name, arguments.steps)
    folders = {name: RUNS / name.replace(" ", "_") for name in VARIANTS}
    runs = {name: read_run(folder) for name, folder in folders.items() if folder.exists()}
    draw(runs)
    metrics = ["router/max_load", "router/load_entropy", "router/dead_experts", "eval/loss"]
    print("| | " + " | ".join(metrics) + " |\n|---|" + "---|" * len(metrics))
    for name, run in runs.items():
        last = [
            run.series(metric)[1][-20:].mean() if metric != "eval/loss" else run.series(metric)[1][-1]
            for metric in metrics
        ]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in last) + " |")


if __name__ == "__main__":
    main()
