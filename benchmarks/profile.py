"""Where a training step's time goes.

    python -m benchmarks.profile [RECIPE ...] [--steps 3] [--set KEY=VALUE ...]

Runs each recipe through the trainer for a few steps, after one to warm up. By default these are the case of ``vs_trl``
with its natural lengths, and the demo. A stopwatch times the parts:

    rollout   prefill; decoding (a compiled step, or attention, linear layers, output head and the rest of the model);
              sampling; bookkeeping
    score
    train     the model's forward pass, head and loss, backward pass of each, clipping and optimizer
    sync

A second that lies in two nested parts counts for the inner one alone. On an accelerator each part is synchronized:
shares are right, but the sum is slower than without the stopwatch. Prints a table and, on the last line, one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import hardware, print_table, turn, versions
from benchmarks.trl.case import Case

CASE = "the case of vs_trl"
DEMO = "recipes/demo_cpu.yaml"
PARTS = {
    "rollout": [
        "prefill",
        "weights into panels",
        "decode: compiled step",
        "decode: attention",
        "decode: linear layers",
        "output head",
        "decode: rest of the model",
        "sampling",
        "bookkeeping",
    ],
    "score": [],
    "train": ["forward", "head and loss", "backward: head", "backward: model", "clip and optimizer", "other"],
    "sync": [],
}


def recipe_of(name: str, steps: int, folder: Path, overrides: list[str]) -> Any:
    from benchmarks.trl.sides import our_recipe
    from grpo.config.load import load_recipe

    fixed = {"max_steps": steps + 1, "eval_every": 0, "save_every": 0, "output_dir": str(folder / "run")}
    settings = [f"training.{key}={value}" for key, value in fixed.items()]
    settings += ["evaluation.at_start=false", "data.eval_size=0", *overrides]
    if name != CASE:
        return load_recipe(name, settings)
    import yaml

    file = folder / "case.yaml"
    recipe = our_recipe(Case(row="natural", steps=steps + 2), folder)
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    return load_recipe(file, settings)


def profile(connection: Connection, name: str, steps: int, overrides: list[str]) -> None:
    """Body of a recipe's process."""
    from benchmarks.stopwatch import watched
    from grpo import trainer

    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with tempfile.TemporaryDirectory() as folder, watched() as watch:
        inner, started = trainer.train_step, []

        def step(*args: Any, **kwargs: Any) -> None:
            if len(started) == 1:
                watch.clear()  # the first step was to warm up
            started.append(None)
            inner(*args, **kwargs)

        trainer.train_step = step
        trainer.train(recipe_of(name, steps, Path(folder), overrides))
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "step_time" in row][1:]
    connection.send(shares(rows, dict(watch)))


def shares(rows: list[dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """Seconds a step of each part, and its share of the step."""
    phases = {phase: sum(row[f"time/{phase}"] for row in rows) for phase in PARTS}
    seconds["bookkeeping"] = phases["rollout"] - sum(seconds.get(p, 0.0) for p in PARTS["rollout"][:-1])
    seconds["other"] = phases["train"] - sum(seconds.get(p, 0.0) for p in PARTS["train"][:-1])
    total = sum(phases.values())
    found: dict[str, Any] = {"step_s": total / len(rows), "steps": len(rows), "parts": {}}
    for phase, parts in PARTS.items():
        named = {phase: phases[phase]} | {f"  {part}": seconds.get(part, 0.0) for part in parts}
        for part, value in named.items():
            found["parts"][part] = {"s a step": value / len(rows), "share": value / total}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=[CASE, DEMO])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--lock", help="a file whose lock to take around each recipe, where other jobs take it too")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"versions": versions(), "hardware": hardware(), "settings": vars(options)}
    context = multiprocessing.get_context("spawn")
    for name in options.recipes:
        connection, other = context.Pipe()
        worker = context.Process(target=profile, args=(other, name, options.steps, options.overrides))
        with turn(options.lock):
            worker.start()
            other.close()
            try:
                result[name] = connection.recv()
            except EOFError:
                raise SystemExit(f"{name} failed; its error is above") from None
            worker.join()
        print_table(f"{name}: {result[name]['step_s']:.2f} s a step", result[name]["parts"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
