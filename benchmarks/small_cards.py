"""Ways to train in little memory beside float32 weights: what each learns, what it holds, how far it drifts.

    make smollm2 && python -m benchmarks.small_cards [--variants float32 bfloat16 ...] [--steps 40] [--drift-steps 10]

SmolLM2-135M-Instruct on prompts of countdown, rewarded by the share of digits in what it writes: a pretrained model
climbs that at once, so forty steps show a curve. All variants compute in bfloat16, start from the same weights and
draw from the same seed. Each is a process, one at a time; finished ones are kept, so start the command again after an
interruption. `--report` only writes the page, from what there is. Writes `docs/results/small_cards.md`, replacing the
text between the two markers, and `docs/results/small_cards.png`.

- *Learning*: a run of `--steps` steps, its peak memory, and the bytes that weights, gradients and AdamW hold.
- *Drift*: another, short run, in which a float32 copy of the trained weights is stepped by torch's AdamW with the
  gradients of the run. Drift is |change of the run's weights - change of the copy| / |change of the copy|, since the
  start, after each step. The same gradients also go through other ways to store weights in bfloat16, for comparison.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, hardware, peak_memory_mb, versions

RECIPE = "recipes/countdown_smollm2_cpu.yaml"
PAGE = ROOT / "docs/results/small_cards.md"
BEGIN, END = "<!-- begin: benchmarks.small_cards -->", "<!-- end: benchmarks.small_cards -->"
LORA = ["model.lora={r: 32, lora_alpha: 64}", "optimizer.learning_rate=2e-4"]
VARIANTS = {
    "float32": [],
    "bfloat16": ["model.weights=bfloat16"],
    "8bit": ["optimizer.optim=adamw_8bit"],
    "offload": ["optimizer.offload=true"],
    "bfloat16+8bit+offload": ["model.weights=bfloat16", "optimizer.optim=adamw_8bit", "optimizer.offload=true"],
    "lora": LORA,
    "qlora": [*LORA, "model.load_in_4bit=true"],
}


def settings(variant: str, folder: Path, steps: int, options: argparse.Namespace) -> list[str]:
    return [
        *(f"model.name={options.model}", "model.dtype=bfloat16", "data.template=chat", "data.eval_size=0"),
        *(f"rewards=[{{path: '{ROOT}/benchmarks/digits.py:digits'}}]", "rollout.max_completion_length=32"),
        *(f"training.output_dir={folder}", f"training.max_steps={steps}", "training.save_every=0"),
        *("data.max_prompt_length=128", f"training.seed={options.seed}", "training.log_rollouts_every=0"),
        *VARIANTS[variant],
    ]


# ---------------------------------------------------------------------------------------------------------------------
# One run, in a process of its own


def one_run(variant: str, folder: Path, steps: int, options: argparse.Namespace, *, drift: bool) -> None:
    """Train, and write what was seen to FOLDER.json."""
    from grpo.config.load import load_recipe
    from grpo.model.policy import Policy
    from grpo.trainer import train

    original, seen = Policy.step, {"bytes": {}, "drift": []}
    shadow: list[Shadow] = []

    def step(policy: Policy, learning_rate: float) -> None:
        if drift and not shadow:
            shadow.append(Shadow(policy))
        gradients = bytes_of([p.grad for p in policy.model.parameters() if p.grad is not None])
        for one in shadow:
            one.step(learning_rate)
        original(policy, learning_rate)
        for one in shadow:
            seen["drift"].append(one.drift())
        seen["bytes"] = held(policy) | {"gradients": gradients}

    Policy.step = step
    begun = time.perf_counter()
    train(load_recipe(ROOT / RECIPE, settings(variant, folder, steps, options)))
    seen |= {"peak_mb": peak_memory_mb(), "seconds": time.perf_counter() - begun, "variant": variant, "steps": steps}
    seen |= {"versions": versions("bitsandbytes", "peft"), "hardware": hardware(), "commit": commit()}
    folder.with_suffix(".json").write_text(json.dumps(seen, indent=1))


def bytes_of(tensors: Any) -> int:
    import torch

    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def held(policy: Any) -> dict[str, int]:
    """Bytes of weights and of AdamW's state; the number of trained weights."""
    optimizer = getattr(policy.optimizer, "optimizer", policy.optimizer)
    state = bytes_of(tensor for state in optimizer.state.values() for tensor in state.values())
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    return {
        "weights": bytes_of(policy.model.parameters()),
        "AdamW": state,
        "on the host": state if getattr(optimizer, "offload", False) else 0,
        "trained": sum(p.numel() for p in trained),
    }


class Shadow:
    """float32 copies of the trained weights, stepped by torch's AdamW with the gradients of the run."""

    def __init__(self, policy: Any):
        import torch

        self.trained = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = getattr(policy.optimizer, "optimizer", policy.optimizer)
        self.start = [p.detach().float().clone() for p in self.trained]
        self.copies = [p.clone().requires_grad_() for p in self.start]
        group = self.optimizer.param_groups[0]
        self.adamw = torch.optim.AdamW(
            self.copies, betas=group["betas"], eps=group["eps"], weight_decay=0.0, fused=True
        )
        self.stored = {}
        if self.trained[0].dtype == torch.bfloat16:
            self.stored = {name: [store(p) for p in self.start] for name, store in STORES.items()}

    def step(self, learning_rate: float) -> None:
        """Before the run's own step."""
        import torch

        before = [p.detach().clone() for p in self.copies] if self.stored else []
        for copy, parameter in zip(self.copies, self.trained, strict=True):
            copy.grad = parameter.grad.float()
        self.adamw.param_groups[0]["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for i, was in enumerate(before):
                for stores in self.stored.values():
                    stores[i].add(self.copies[i] - was)

    def drift(self) -> dict[str, float]:
        """After the run's own step: the run's drift, and that of the other ways to store."""
        from grpo.model.compact_adamw import joined

        def run(i: int) -> Any:
            weight, state = self.trained[i].detach(), self.optimizer.state[self.trained[i]]
            if "low" not in state:
                return weight.float()
            return joined(weight.view(weight.shape[0], -1), state["low"]).view_as(weight)

        found = {"run": self._distance(run)}
        for name, stores in self.stored.items():
            found[name] = self._distance(lambda i, stores=stores: stores[i].value())
        return found

    def _distance(self, value: Callable[[int], Any]) -> float:
        off = sum(float((value(i) - copy.detach()).double().square().sum()) for i, copy in enumerate(self.copies))
        moved = sum(
            float((copy.detach() - start).double().square().sum())
            for copy, start in zip(self.copies, self.start, strict=True)
        )
        return (off / moved) ** 0.5 if moved else 0.0


class Nearest:
    """bfloat16, each sum rounded to nearest."""

    def __init__(self, start: Any):
        self.weight = start.bfloat16()

    def add(self, change: Any) -> None:
        self.weight = (self.weight.float() + change).bfloat16()

    def value(self) -> Any:
        return self.weight.float()


class Stochastic(Nearest):
    """bfloat16, rounded up or down by chance, as torchao's AdamW with bf16_stochastic_round does."""

    def add(self, change: Any) -> None:
        import torch

        bits = (self.weight.float() + change).view(torch.int32)
        chance = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32)
        self.weight = ((bits + chance) & -0x10000).view(torch.float32).bfloat16()


class Kahan(Nearest):
    """bfloat16 with Kahan's compensation in bfloat16, as optimi's AdamW has it."""

    def __init__(self, start: Any):
        super().__init__(start)
        self.compensation = start.bfloat16().zero_()

    def add(self, change: Any) -> None:
        change = self.compensation.float() + change
        before = self.weight.float()
        self.weight = (before + change).bfloat16()
        self.compensation = (change - (self.weight.float() - before)).bfloat16()

    def value(self) -> Any:
        return self.weight.float() + self.compensation.float()


STORES = {"nearest": Nearest, "stochastic rounding": Stochastic, "Kahan": Kahan}


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# The page


def rewards_of(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["reward"] for row in rows if "reward" in row]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(found: dict[str, dict[str, Any]], steps: int) -> str:
    part = max(1, steps // 4)
    spans = [(start, min(start + part, steps)) for start in range(0, steps, part)]
    head = [f"reward, steps {a + 1}-{b}" for a, b in spans]
    head += [
        "trained, M",
        "weights",
        "gradients",
        "AdamW",
        "on the host",
        "bytes a trained weight",
        "peak, MB",
        "drift after step 1",
        "after the last",
    ]
    lines = ["| variant | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for variant, one in found.items():
        size = one["bytes"]
        device = size["gradients"] + size["AdamW"] - size["on the host"]
        own = (device + size["weights"]) / size["trained"] if "lora" not in variant else device / size["trained"]
        cells = [f"{mean(one['rewards'][a:b]):.3f}" for a, b in spans]
        cells.append(f"{size['trained'] / 1e6:.1f}")
        cells += [f"{size[key] / 1e6:,.0f} MB" for key in ("weights", "gradients", "AdamW", "on the host")]
        cells += [f"{own:.1f}", f"{one['peak_mb']:,.0f}"]
        cells += [percent(one["drift"][k]["run"] if one["drift"] else None) for k in (0, -1)]
        lines.append(f"| `{variant}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}%"


def drift_table(drift: list[dict[str, float]]) -> str:
    """A row a way to store weights; a column for some of the steps."""
    steps = sorted({0, *range(1, len(drift), max(1, len(drift) // 5)), len(drift) - 1})
    extra = {"nearest": 0, "stochastic rounding": 0, "Kahan": 2, "run": 2}
    names = {"run": "**the low 16 bits kept apart (`model.weights: bfloat16`)**"}
    head = ["bfloat16 weights", "bytes a weight besides", *(f"drift, step {step + 1}" for step in steps)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, beside in extra.items():
        cells = [names.get(name, name), str(beside), *(percent(drift[step][name]) for step in steps)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from grpo.report.drawing import LIGHT, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        ax = figure.subplots()
        for i, (variant, one) in enumerate(found.items()):
            rewards = one["rewards"]
            smooth = [mean(rewards[max(0, k - 4) : k + 1]) for k in range(len(rewards))]
            colour = LIGHT.series[i % len(LIGHT.series)]
            ax.plot(range(1, len(smooth) + 1), smooth, color=colour, linestyle="--" if "lora" in variant else "-",
                    label=variant)  # fmt: skip
        ax.set(xlabel="step", ylabel="reward, mean of the last five steps")
        ax.grid(color=LIGHT.grid)
        ax.legend()
        figure.savefig(path, dpi=110)


def report(options: argparse.Namespace) -> None:
    found = {}
    for variant in options.variants:
        folder = options.folder / variant
        if folder.with_suffix(".json").exists():
            found[variant] = json.loads(folder.with_suffix(".json").read_text()) | {"rewards": rewards_of(folder)}
            drift = options.folder / f"{variant}_drift.json"
            found[variant]["drift"] = json.loads(drift.read_text())["drift"] if drift.exists() else []
    first = next(iter(found.values()))
    draw(found, options.page.with_suffix(".png"))
    machine = first["hardware"]
    about = (
        f"SmolLM2-135M-Instruct, reward: the share of digits; {first['steps']} steps of 4 prompts x 8 completions of "
        f"at most 32 tokens, seed {options.seed}, computed in bfloat16. Drift is relative to the whole change of the "
        f"weights since the start ({options.drift_steps} steps, in another run). Bytes a trained weight are those on "
        "the device (weights, gradients, AdamW; with LoRA without the frozen weights). "
        f"{machine['cpu']}, {machine['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        + f"; commit {', '.join(sorted({one['commit'] for one in found.values()}))}."
    )
    stores = found.get("bfloat16", {}).get("drift")
    part = f"""{BEGIN}
    python -m benchmarks.small_cards --steps {first["steps"]} --drift-steps {options.drift_steps} --seed {options.seed}

{textwrap.fill(about, 120)}

{table(found, first["steps"])}

![reward over steps]({options.page.with_suffix(".png").name})

The same gradients through ways to store weights in bfloat16:

{drift_table(stores) if stores else ""}
{END}"""
    before, after = "# Training in little memory\n\n", "\n"
    if options.page.exists():
        text = options.page.read_text(encoding="utf-8")
        before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    options.page.write_text(before + part + after, encoding="utf-8")
    print(part)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_cards", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--drift-steps", type=int, default=10, help="0 leaves the drift out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--folder", type=Path, default=Path("runs/small_cards"))
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--report", action="store_true", help="only write the page")
    parser.add_argument("--one", metavar="RUN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        drift = options.one.endswith("_drift")
        steps = options.drift_steps if drift else options.steps
        one_run(options.one.removesuffix("_drift"), options.folder / options.one, steps, options, drift=drift)
        return
    runs = [*options.variants, *(f"{v}_drift" for v in options.variants if options.drift_steps and "lora" not in v)]
    for run in [] if options.report else runs:
        folder = options.folder / run
        if folder.with_suffix(".json").exists():
            print(f"{folder}: finished before", flush=True)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.small_cards", *sys.argv[1:], "--one", run], check=False
        )
        if done.returncode:
            sys.exit(f"{folder}: ended with exit code {done.returncode}; start again to go on from there")
    report(options)


if __name__ == "__main__":
    main()
