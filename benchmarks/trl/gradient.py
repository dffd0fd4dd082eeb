"""The gradient of the same samples under the same weights, by TRL's loss and by our update."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.trl.case import Case


def gradient_difference(case: Case) -> float:
    """||ours - TRL's|| / ||TRL's|| over all weights, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    worker = context.Process(target=_measure, args=(other, case))
    worker.start()
    other.close()
    try:
        return connection.recv()
    except EOFError:
        raise RuntimeError("the comparison of gradients failed; its error is above") from None
    finally:
        worker.join()


def _measure(connection: Connection, case: Case) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with tempfile.TemporaryDirectory() as folder:
        samples, theirs = trl_gradient(replace(case, row="same work"), Path(folder))
        connection.send(relative_difference(our_gradient(case, samples, Path(folder)), theirs))


def trl_gradient(case: Case, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One step of TRL's trainer: its samples with their advantages, and the gradient before the optimizer's step."""
    from transformers import TrainerCallback

    from benchmarks.trl.sides import force_trl_lengths, trl_trainer

    gradients: dict[str, Any] = {}

    class Capture(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            gradients.update({name: p.grad.detach().clone() for name, p in model.named_parameters()})

    settings = {**case.trl, "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0}
    trainer = trl_trainer(replace(case, trl=settings), folder, [Capture()])
    force_trl_lengths(trainer, case)
    samples: list[dict[str, Any]] = []
    make = trainer._generate_and_score_completions

    def kept(inputs: Any) -> Any:
        found = make(inputs)
        for i, advantage in enumerate(found["advantages"].tolist()):
            ids = {part: found[f"{part}_ids"][i][found[f"{part}_mask"][i] > 0] for part in ("prompt", "completion")}
            samples.append({"advantage": advantage, **{part: t.tolist() for part, t in ids.items()}})
        return found

    trainer._generate_and_score_completions = kept
    trainer.train()
    return samples, gradients


def our_gradient(case: Case, samples: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The gradient of the samples by one update of ours. The optimizer's step itself is intercepted."""
    from accelerate.state import AcceleratorState

    from benchmarks.trl.sides import our_recipe
    from grpo.model.loading import load_tokenizer
    from grpo.model.policy import Policy
    from grpo.run.run import Run
    from grpo.run.session import make_accelerator
    from grpo.types import TrainedSequence
    from grpo.update.step import optimizer_step

    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = our_recipe(replace(case, ours={**case.ours, "optimizer": {"max_grad_norm": 0.0}}), folder)
    accelerator, tokenizer = make_accelerator(recipe), load_tokenizer(recipe.model)
    policy = Policy(recipe, accelerator, tokenizer, [tokenizer.eos_token_id], needs_reference=False)
    found: dict[str, Any] = {}

    def capture(_: float) -> None:
        found.update({name: p.grad.detach().clone() for name, p in policy.causal_lm.named_parameters()})

    policy.step = capture  # type: ignore[method-assign]
    sequences = [
        TrainedSequence(s["prompt"], s["completion"], [0.0] * len(s["completion"]), s["advantage"]) for s in samples
    ]
    optimizer_step(Run(recipe, policy, folder), sequences, 1.0)
    return found


def relative_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    assert ours.keys() == theirs.keys(), f"other parameters: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    squares = [
        ((ours[n].double() - theirs[n].double()).square().sum(), theirs[n].double().square().sum()) for n in ours
    ]
    return float(sum(d for d, _ in squares) ** 0.5 / sum(t for _, t in squares) ** 0.5)
