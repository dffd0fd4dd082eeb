"""A GRPO step of ours against one of TRL's: samples a second, peak memory, time by part, and equal gradients.

    python -m benchmarks.vs_trl [--dtype bfloat16] [--steps 5] [--rows "same work" natural]

Each side runs its own trainer in a process of its own, in turn, a step each: same weights, prompts, lengths, compute
type and threads, float32 master weights, AdamW, one update a rollout, no KL penalty, the dapo loss. Results are medians
of the steps after the first. Rows:

- same work: both sides make completions of the same lengths (``Case.lengths``), and every completion has an advantage.
  On TRL's side a logits processor allows the end-of-sequence token at that length alone; on ours the stop decision is
  replaced. The lengths that were trained on are compared.
- natural: completions end by themselves, and the reward is sparse. A group with equal rewards has no gradient: ours
  skips it, TRL computes its zeros.

Then samples and advantages of one step are taken from TRL's trainer, and their gradient is computed by TRL's loss and
by our update, in float32. ``gradient_difference`` is the norm of the difference over the norm. The last line is one
JSON object.

``--sweep`` measures TRL's side alone under the settings in SWEEP: ``BEST`` is the fastest of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import end_in_order, hardware, median, print_table, turn, versions
from benchmarks.trl.case import REWARDS, Case
from benchmarks.trl.gradient import gradient_difference
from benchmarks.trl.sides import SIDES, run_side

BEST: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
}
# Other settings that were tried, each changing BEST. Seconds a step (rollout, train) and peak memory of TRL 1.16.0,
# `--sweep --steps 1 --rows "same work"`, float32, torch 2.13.0, transformers 5.19.0, on two cores of a Xeon at 2.8 GHz
# that were shared: equal work varied by 15%.
#
#     best (batch of 2)   80 (39, 41)   4.2 GB      checkpointing   101 (45, 56)   3.5 GB
#     batch of 1          96 (45, 50)   3.5 GB      static cache    109 (55, 54)   4.2 GB
#     batch of 4         104 (42, 62)   5.4 GB      adamw_torch      75 (35, 40)   4.2 GB
#     batch of 8          80 (38, 42)   8.0 GB      torch.compile    96 (43, 53)   4.3 GB, after 110 s of compiling
#
# Eager attention took 1.3 times as long on the tiny model; hub kernels and liger are Triton's, for GPUs; continuous
# batching samples more slowly than `generate` on a CPU (benchmarks.rollout).
SWEEP: dict[str, dict[str, Any]] = {
    "best": {},
    "batch of 4": {"per_device_train_batch_size": 4},
    "batch of 1": {"per_device_train_batch_size": 1},
    "batch of 8": {"per_device_train_batch_size": 8},
    "batch of 32": {"per_device_train_batch_size": 32},
    "checkpointing": {"gradient_checkpointing": True},
    "adamw_torch": {"optim": "adamw_torch"},
    "static cache": {"cache_implementation": "static"},
    # With bfloat16 it casts the weights that are trained. Its completions can only be forced to the limit.
    "continuous batching": {"use_transformers_continuous_batching": True},
    # Not the same work: no float32 master weights.
    "bfloat16 weights": {"model_init_kwargs": {"dtype": "bfloat16"}},
    "eager attention": {"model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"}},
    "hub kernels": {"model_init_kwargs": {"dtype": "float32", "use_kernels": True}},
    "liger": {"use_liger_kernel": True},
    "torch.compile": {"torch_compile": True},
}

Step = Callable[[], dict[str, Any]]


@contextmanager
def process(name: str, case: Case, log: str, lock: str | None) -> Iterator[Step]:
    """A side's process, ready for its first step. Yields a function that makes it do a step and returns its notes."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    worker = context.Process(target=run_side, args=(SIDES[name], other, case, log))

    def notes() -> dict[str, Any]:
        try:
            found = connection.recv()
        except EOFError:
            found = {"error": "its process was ended"}
        if "error" in found:
            raise RuntimeError(f"{name}: {found['error']}\n{Path(log).read_text()[-2000:]}")
        return found

    def step() -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # ``notes`` reports it
            connection.send("step")
        return notes()

    with turn(lock):
        worker.start()
        other.close()
        try:
            notes()
        except BaseException:
            worker.terminate()
            raise
    try:
        yield step
        connection.send("stop")
        worker.join(60)
    finally:
        worker.terminate()
        worker.join()


def compare(case: Case, steps: int, lock: str | None, names: tuple[str, ...] = ("ours", "trl")) -> dict[str, Any]:
    """Medians of each side: first one step of each to warm up, then ``steps`` of each in turn."""
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        both = [process(name, case, f"{folder}/{name}.log", lock) for name in names]
        with both[0] as first, both[1] if len(both) > 1 else nullcontext() as second:
            for i in range(steps + 1):
                with turn(lock):
                    notes = {name: step() for name, step in zip(names, (first, second), strict=False)}
                for name in names if i > 0 else ():
                    taken[name].append(notes[name])
                print(f"{case.row}, {i}/{steps}:", {n: round(notes[n]["seconds"], 2) for n in names}, flush=True)
    found = {name: side_medians(case, notes) for name, notes in taken.items()}
    if case.row == "same work":
        wanted = [sorted(case.lengths(i + 1)) for i in range(steps)]
        for name, notes in taken.items():
            assert [sorted(n["lengths"]) for n in notes] == wanted, f"{name} made other lengths than asked for"
    return found


def side_medians(case: Case, notes: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = median([n["seconds"] for n in notes])
    phases = {name for n in notes for name in n["phases"]}
    tokens = [sum(n["lengths"]) for n in notes]
    found = {
        "samples_per_s": case.prompts * case.generations / seconds,
        "step_s": seconds,
        **{f"{name}_s": median([n["phases"].get(name, 0.0) for n in notes]) for name in sorted(phases)},
        "peak_mb": max(n["peak_mb"] for n in notes),
        "completion_tokens": median(tokens),
        "longest": max(max(n["lengths"]) for n in notes),
        "prompt_tokens": median([sum(n["prompt_tokens"]) for n in notes]),
        "groups_with_signal": sum(n["groups_with_signal"] for n in notes) / len(notes),
        "steps": [round(n["seconds"], 2) for n in notes],
    }
    if "rollout and score_s" in found:  # TRL's: the rest of the step is its update
        found["score_s"] = found.pop("rollout and score_s") - found["rollout_s"]
        found["train_s"] = seconds - found["rollout_s"] - found["score_s"]
    return found


COLUMNS = ("samples_per_s", "step_s", "rollout_s", "score_s", "train_s", "peak_mb", "completion_tokens", "longest")


def show(title: str, sides: dict[str, dict[str, Any]]) -> None:
    columns = (*COLUMNS, "prompt_tokens", "groups_with_signal")
    print_table(title, {name: {c: row.get(c) for c in columns} for name, row in sides.items()})


def sweep(case: Case, steps: int, lock: str | None, only: list[str]) -> dict[str, Any]:
    """TRL's side under each of SWEEP's settings. A setting that does not run gets the reason instead."""
    found: dict[str, Any] = {}
    fixed = case.mean_length == case.max_length or case.row == "natural"
    for name in only or [name for name in SWEEP if fixed or name != "continuous batching"]:
        settings = {**case.trl, **SWEEP[name]}
        settings["per_device_train_batch_size"] = min(
            settings["per_device_train_batch_size"], case.prompts * case.generations
        )
        try:
            found[name] = compare(_with(case, trl=settings), steps, lock, ("trl",))["trl"]
        except RuntimeError as error:
            found[name] = {"error": str(error).splitlines()[0]}
        print(json.dumps({name: found[name]}), flush=True)
    rows = {name: row for name, row in found.items() if "error" not in row}
    if rows:
        show(f"TRL, {case.row}, {case.dtype}", rows)
    return found


def _with(case: Case, **changes: Any) -> Case:
    return Case(**{**asdict(case), **changes})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Case.model)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=Case.dtype)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=Case.device)
    parser.add_argument("--prompts", type=int, default=Case.prompts)
    parser.add_argument("--generations", type=int, default=Case.generations)
    parser.add_argument("--mean-length", type=int, default=Case.mean_length)
    parser.add_argument("--max-length", type=int, default=Case.max_length)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each side, after one to warm up")
    parser.add_argument("--rows", nargs="*", choices=list(REWARDS), default=list(REWARDS))
    parser.add_argument("--trl", type=json.loads, default={}, help="JSON: settings of GRPOConfig over BEST")
    parser.add_argument("--ours", type=json.loads, default={}, help="JSON: sections of our recipe")
    parser.add_argument("--sweep", nargs="*", metavar="NAME", help="measure TRL's side alone under SWEEP's settings")
    parser.add_argument("--no-gradients", action="store_true")
    parser.add_argument("--lock", help="a file whose lock to take around a step of each, where other jobs take it too")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    case = Case(
        model=str(Path(options.model)),
        dtype=options.dtype,
        device=options.device,
        prompts=options.prompts,
        generations=options.generations,
        mean_length=options.mean_length,
        max_length=options.max_length,
        steps=max(options.steps + 2, 4),
        trl={**BEST, **options.trl},
        ours=options.ours,
    )
    result: dict[str, Any] = {"versions": versions("trl", "peft", "datasets"), "hardware": hardware()}
    result["settings"] = asdict(case)
    for row in options.rows:
        now = _with(case, row=row)
        if options.sweep is not None:
            result[f"sweep, {row}"] = sweep(now, options.steps, options.lock, options.sweep)
            continue
        result[row] = sides = compare(now, options.steps, options.lock)
        show(f"{row}: {options.model}, {options.dtype}, {case.prompts} x {case.generations}", sides)
        prefix = "" if row == "same work" else f"{row}_"
        rates = {name: side["samples_per_s"] for name, side in sides.items()}
        result[f"{prefix}samples_per_s"] = rates
        result[f"{prefix}samples_per_s_ratio"] = rates["ours"] / rates["trl"]
        result[f"{prefix}peak_memory_ratio"] = sides["ours"]["peak_mb"] / sides["trl"]["peak_mb"]
    if not options.no_gradients and options.sweep is None:
        with turn(options.lock):
            result["gradient_difference"] = gradient_difference(_with(case, dtype="float32"))
    return result


def main(arguments: list[str] | None = None) -> None:
    end_in_order()
    print(json.dumps(measure(parse(arguments))))


if __name__ == "__main__":
    main()
