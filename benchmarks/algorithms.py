"""The demo's recipe under each policy-gradient variant in turn: held-out accuracy over time and over samples.

    python -m benchmarks.algorithms [--variants grpo dapo dapo+dynamic] [--seeds 0 1] [--seconds 240]

Trains `recipes/demo_cpu.yaml` from the committed base. Each run is a process, one at a time, all variants of one seed
before the next seed. Start the command again after an interruption: finished runs are kept, an interrupted run starts
over. `--report` only writes the page, from the runs that there are. A variant is a loss, alone or with additions, such
as `dapo+dynamic`: see LOSSES and MORE. Writes `docs/results/algorithms.md`, replacing only the text between the two
markers, and `docs/results/algorithms.png`.

Every run makes `--minibatches` optimizer steps a rollout. With one, every ratio is 1 and no clip binds, so that `gspo`
would be `grpo` and `cispo` `dapo`.

Time counts training steps alone (rollout, scoring, update, hand-over of weights), not evaluation. Samples count all
completions, also of groups that were thrown away.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, turn
from grpo.run.read import RunRecord, read_run

RECIPE = "recipes/demo_cpu.yaml"
PAGE = ROOT / "docs/results/algorithms.md"
BEGIN, END = "<!-- begin: benchmarks.algorithms -->", "<!-- end: benchmarks.algorithms -->"

LOSSES = {
    "grpo": ["algorithm.loss_type=grpo"],
    "dr_grpo": ["algorithm.loss_type=dr_grpo", "algorithm.scale_rewards=none"],
    "dapo": ["algorithm.loss_type=dapo", "algorithm.epsilon_high=0.28"],
    "gspo": ["algorithm.loss_type=gspo", "algorithm.epsilon=3e-4", "algorithm.epsilon_high=4e-4"],
    "cispo": ["algorithm.loss_type=cispo", "algorithm.epsilon_high=5.0"],
    "rloo": ["algorithm.loss_type=rloo", "algorithm.baseline=leave_one_out", "algorithm.scale_rewards=none"],
}
MORE = {
    "dynamic": ["prompts.dynamic_sampling=true"],
    "curriculum": ["prompts.curriculum=true"],
    "replay": ["prompts.replay_groups=32"],
    "pass4": ["algorithm.pass_at_k=4"],
    "few": ["data.train_size=128"],  # so that prompts come back; the demo's 1,309 hardly do
}


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy of a run at its evaluations, with the seconds of training and the samples until then."""

    variant: str
    seed: int
    steps: int
    seconds_E: np.ndarray
    samples_E: np.ndarray
    accuracy_E: np.ndarray
    low: float
    high: float
    length: float


def overrides(variant: str) -> list[str]:
    """A variant's changes to the recipe. Raises SystemExit for an unknown variant."""
    loss, *more = variant.split("+")
    unknown = [name for name, known in [(loss, LOSSES), *((m, MORE) for m in more)] if name not in known]
    if unknown:
        sys.exit(
            f"no variant {variant!r}: {unknown[0]} is unknown; a loss is one of {', '.join(LOSSES)}, and what may be "
            f"added to it with a +, one or several of {', '.join(MORE)}"
        )
    return [*LOSSES[loss], *(key for name in more for key in MORE[name])]


def command(variant: str, seed: int, folder: Path, options: argparse.Namespace) -> list[str]:
    return [
        *("grpo", "train", RECIPE, f"training.output_dir={folder}", f"training.seed={seed}"),
        *(f"training.max_seconds={options.seconds}", f"training.max_steps={options.steps}"),
        *(f"training.eval_every={options.eval_every}", f"algorithm.num_minibatches={options.minibatches}"),
        *overrides(variant),
        *options.set,
    ]


def train(variant: str, seed: int, options: argparse.Namespace) -> None:
    """One run, unless it is finished already. The files of an interrupted run are removed first."""
    folder = options.folder / f"{variant}_seed{seed}"
    if (folder / "final/model.safetensors").exists():
        print(f"{folder}: finished before", flush=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    arguments = command(variant, seed, folder, options)
    print(shlex.join(arguments), flush=True)
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"{folder}: the run ended with exit code {done.returncode}; start again to go on from there")


def curve(variant: str, seed: int, run: RunRecord) -> Curve:
    """Seconds and samples are summed over steps, up to each evaluation's own step."""
    steps, seconds = run.series("step_time")
    groups = np.full(len(steps), float(run.setting("training.prompts_per_step")))
    drawn_at, drawn = run.series("dynamic_sampling/groups_drawn")
    groups[np.isin(steps, drawn_at)] = drawn
    samples = groups * run.setting("rollout.num_generations")
    evaluated, accuracy = run.series("eval/accuracy")
    made = np.searchsorted(steps, evaluated, side="right")  # steps made by then
    last = run.evaluation[-1]
    return Curve(
        variant,
        seed,
        len(steps),
        np.concatenate([[0.0], np.cumsum(seconds)])[made],
        np.concatenate([[0.0], np.cumsum(samples)])[made],
        accuracy,
        last["eval/accuracy_low"],
        last["eval/accuracy_high"],
        last["eval/completions/mean_length"],
    )


def table(curves: list[Curve]) -> str:
    """A row a run, then a row a variant: means over its seeds."""
    seconds = min(c.seconds_E[-1] for c in curves)
    samples = min(c.samples_E[-1] for c in curves)

    def numbers(c: Curve) -> dict[str, float]:
        return {
            "steps": c.steps,
            "seconds": c.seconds_E[-1],
            "samples": c.samples_E[-1],
            "before": c.accuracy_E[0],
            "end": c.accuracy_E[-1],
            "best": c.accuracy_E.max(),
            "after_seconds": float(np.interp(seconds, c.seconds_E, c.accuracy_E)),
            "after_samples": float(np.interp(samples, c.samples_E, c.accuracy_E)),
            "length": c.length,
        }

    def cells(found: dict[str, float], interval: str = "") -> str:
        accuracy = [f"{found[k]:.3f}" for k in ("before", "end", "best", "after_seconds", "after_samples")]
        accuracy[1] += interval
        whole = [f"{found[k]:,.0f}" for k in ("steps", "seconds", "samples")]
        return " | ".join([*whole, *accuracy, f"{found['length']:.0f}"])

    head = (
        f"steps | seconds | samples | before | at the end | best | after {seconds:.0f} s | after {samples:,.0f} samples"
    )
    lines = [f"| variant | seed | {head} | length |", "|---" * 11 + "|"]
    for c in curves:
        lines.append(f"| `{c.variant}` | {c.seed} | {cells(numbers(c), f' [{c.low:.3f}, {c.high:.3f}]')} |")
    for variant, of_variant in by_variant(curves):
        found = [numbers(c) for c in of_variant]
        mean = {name: statistics.fmean(f[name] for f in found) for name in found[0]}
        lines.append(f"| **`{variant}`** | mean of {len(found)} | {cells(mean)} |")
    return "\n".join(lines)


def by_variant(curves: list[Curve]) -> Iterator[tuple[str, list[Curve]]]:
    for variant in dict.fromkeys(c.variant for c in curves):
        yield variant, [c for c in curves if c.variant == variant]


def draw(curves: list[Curve], path: Path, seconds: str = "seconds of training") -> None:
    """Accuracy over seconds and samples: a thin line for every run, and each variant's mean over the common range."""
    import matplotlib
    from matplotlib.figure import Figure

    from grpo.report.drawing import LIGHT, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        for ax, name, label in zip(
            figure.subplots(1, 2, sharey=True),
            ("seconds_E", "samples_E"),
            (seconds, "samples"),
            strict=True,
        ):
            for i, (variant, of_variant) in enumerate(by_variant(curves)):
                style: dict[str, Any] = {
                    "color": LIGHT.series[i % len(LIGHT.series)],
                    "linestyle": "--" if i >= len(LIGHT.series) else "-",
                }
                for c in of_variant:
                    ax.plot(getattr(c, name), c.accuracy_E, linewidth=0.6, alpha=0.5, **style)
                grid = np.linspace(0, min(getattr(c, name)[-1] for c in of_variant), 60)
                mean = np.mean([np.interp(grid, getattr(c, name), c.accuracy_E) for c in of_variant], axis=0)
                ax.plot(grid, mean, label=variant, **style)
            ax.set_xlabel(label)
            ax.grid(color=LIGHT.grid)
        figure.axes[0].set_ylabel("held-out accuracy")
        figure.axes[1].legend(loc="lower right")
        figure.savefig(path, dpi=110)


def report(curves: list[Curve], runs: list[RunRecord], options: argparse.Namespace) -> None:
    """Write the page's table and picture. Text around them, which people wrote, stays."""
    draw(curves, options.page.with_suffix(".png"))
    again = [
        "--seconds",
        f"{options.seconds:g}",
        "--steps",
        str(options.steps),
        "--minibatches",
        str(options.minibatches),
    ]
    again += ["--variants", *options.variants, "--seeds", *map(str, options.seeds)]
    again += ["--set", *options.set] if options.set else []
    about = (
        f"`{RECIPE}` from the committed base, {options.minibatches} optimizer steps a rollout, at most {options.steps} "
        f"rollouts and {options.seconds:g} s of training a run. Held-out: "
        f"{runs[0].setting('data.eval_size')} tasks, one completion each at temperature 1, 95% intervals in brackets. "
        f"{machine_and_versions(runs)}."
    )
    part = f"""{BEGIN}
    python -m benchmarks.algorithms {shlex.join(again)}

{textwrap.fill(about, 120)}

{table(curves)}

![held-out accuracy over time and over samples]({options.page.with_suffix(".png").name})
{END}"""
    put(part, options.page, "# Policy-gradient variants on the demo's task")
    print(f"\n{table(curves)}\n\n{options.page}")


def machine_and_versions(runs: list[RunRecord]) -> str:
    """Hardware, versions and commit that the runs were made with."""
    environments = [run.environment for run in runs]
    packages = environments[0]["packages"]
    commits = sorted({(e.get("source") or {}).get("commit") or "unknown" for e in environments})
    machines = sorted(
        {f"{e['cpu']['model']}, {e['cpu']['cores']} cores, {e['threads']} threads a run" for e in environments}
    )
    return (
        f"{'; '.join(machines)}; torch {packages['torch']}, transformers {packages['transformers']}, Python "
        f"{environments[0]['python']}; commit {', '.join(c[:7] for c in commits)}"
    )


def put(part: str, page: Path, title: str) -> None:
    """Write ``part``, which has the markers as its first and last line, where they are in the page, or to a new one."""
    begin, end = part.splitlines()[0], part.splitlines()[-1]
    before, after = f"{title}\n\n", "\n"
    if page.exists():
        text = page.read_text(encoding="utf-8")
        if begin not in text or end not in text:
            sys.exit(f"{page} has no lines {begin} and {end}: put them where the table belongs")
        before, after = text[: text.index(begin)], text[text.index(end) + len(end) :]
    page.write_text(before + part + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.algorithms", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--variants", nargs="+", default=[*LOSSES, "dapo+dynamic", "dapo+few", "dapo+few+curriculum"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seconds", type=float, default=240.0, help="of training a run")
    parser.add_argument("--steps", type=int, default=36, help="most rollouts a run")
    parser.add_argument("--eval-every", type=int, default=6)
    parser.add_argument("--minibatches", type=int, default=2, help="optimizer steps a rollout")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every run")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/algorithms")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--lock", help="a file that whoever needs the machine to himself locks: one run at a time")
    parser.add_argument("--report", action="store_true", help="train nothing, report the runs that are finished")
    options = parser.parse_args()
    for variant in options.variants:
        overrides(variant)
    asked = [(variant, seed) for seed in options.seeds for variant in options.variants]
    if not options.report:
        for variant, seed in asked:
            with turn(options.lock):
                train(variant, seed, options)
    folders = {(v, s): options.folder / f"{v}_seed{s}" for v in options.variants for s in options.seeds}
    runs = {which: read_run(f) for which, f in folders.items() if (f / "final/model.safetensors").exists()}
    if not runs:
        sys.exit(f"no run in {options.folder} is finished")
    report([curve(*which, run) for which, run in runs.items()], list(runs.values()), options)


if __name__ == "__main__":
    main()
