"""The two sides of ``vs_trl``, each a process that makes one training step at a time when told to.

Both run their trainer's own loop (``grpo.trainer.train``, ``GRPOTrainer.train``), which waits at the start of each step
until it is told to go on. The time is from there to the start of the next step, everything included.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.common import peak_memory_mb
from benchmarks.trl import case as trl_case
from benchmarks.trl.case import Case

RECIPE: dict[str, Any] = {
    "algorithm": {"loss_type": "dapo", "beta": 0.0},
    "evaluation": {"at_start": False},
    "data": {"template": "none", "shuffle": False, "eval_size": 0, "max_prompt_length": 384},
}
TRL: dict[str, Any] = {
    "loss_type": "dapo",
    "beta": 0.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "epsilon": 0.2,
    "scale_rewards": "group",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "shuffle_dataset": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


class Stopped(BaseException):
    """Raised when the controller wants no further step."""


class Gate:
    """Where a side waits at the start of each step. The side's notes go out with the step's seconds."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.begun: float | None = None
        self.notes: dict[str, Any] = {}

    def __call__(self) -> None:
        seconds = perf_counter() - self.begun if self.begun is not None else None
        self.connection.send({"seconds": seconds, "peak_mb": peak_memory_mb(), **self.notes})
        self.notes = {}
        if self.connection.recv() == "stop":
            raise Stopped
        self.begun = perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = perf_counter()
        yield
        seconds = self.notes.setdefault("phases", {})
        seconds[name] = seconds.get(name, 0.0) + perf_counter() - start


def run_side(side: Callable[[Gate, Case, Path], None], connection: Connection, case: Case, log: str) -> None:
    """Body of a side's process. Its output goes to ``log``, an error to the controller."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    with tempfile.TemporaryDirectory() as folder:
        try:
            side(Gate(connection), case, Path(folder))
        except Stopped:
            pass
        except BaseException as error:
            connection.send({"error": f"{type(error).__name__}: {error}"})
            raise


# --- ours


def ours(gate: Gate, case: Case, folder: Path) -> None:
    from grpo import trainer

    step = trainer.train_step

    def waiting_step(*args: Any, **kwargs: Any) -> None:
        gate()
        step(*args, **kwargs)
        lines = (folder / "run/metrics.jsonl").read_text().splitlines()
        seconds = {k: v for k, v in json.loads(lines[-1]).items() if k.startswith("time/")}
        gate.notes["phases"] = {name.removeprefix("time/"): value for name, value in seconds.items()}

    trainer.train_step = waiting_step
    note_groups(gate)
    if case.row == "same work":
        force_our_lengths(case)
    trainer.train(our_recipe(case, folder))


def our_recipe(case: Case, folder: Path) -> Any:
    from grpo.config import Recipe

    recipe = {
        **RECIPE,
        "model": {"name": case.model, "dtype": case.dtype},
        "data": {**RECIPE["data"], "path": str(case.write_rows(folder))},
        "rewards": [{"path": f"{trl_case.__file__}:{trl_case.REWARDS[case.row]}", "needs_group": True}],
        "rollout": {"num_generations": case.generations, "max_completion_length": case.max_length},
        "optimizer": {"learning_rate": case.learning_rate},
        "training": {
            "output_dir": str(folder / "run"),
            "prompts_per_step": case.prompts,
            "max_steps": case.steps,
            "eval_every": 0,
            "save_every": 0,
        },
    }
    for section, values in case.ours.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    return Recipe.model_validate(recipe)


def note_groups(gate: Gate) -> None:
    """Note the lengths of each step's prompts and completions, as the trainer gets them, and the groups with signal."""
    from grpo import trainer

    take, advantages = trainer.Rollouts.take, trainer.step_advantages

    def noted_take(*args: Any, **kwargs: Any) -> Any:
        taken = take(*args, **kwargs)
        groups = [taken[place] for place in sorted(taken)]
        gate.notes["lengths"] = [len(c.token_ids) for group in groups for c in group.completions]
        gate.notes["prompt_tokens"] = [len(group.prompt.token_ids) for group in groups for _ in group.completions]
        return taken

    def noted_advantages(*args: Any, **kwargs: Any) -> Any:
        found = advantages(*args, **kwargs)
        gate.notes["groups_with_signal"] = int((found != 0).any(1).sum())
        return found

    trainer.Rollouts.take = noted_take  # type: ignore[method-assign]
    trainer.step_advantages = noted_advantages


def force_our_lengths(case: Case) -> None:
    """End each completion at the case's length, and nowhere else."""
    from grpo.backends.hf.backend import HFBackend

    wanted: dict[int, int] = {}
    generate = HFBackend.generate

    def noted_generate(self: Any, requests: Any, sampling: Any, version: int, *rest: Any) -> Any:
        keys = [key for request in requests for key in request.keys]
        wanted.update(zip(keys, case.lengths(version), strict=True))
        return generate(self, requests, sampling, version, *rest)

    def ended(self: Any, key: int, token_ids: list[int], stop: Any) -> bool:
        return len(token_ids) >= wanted[key]

    HFBackend.generate = noted_generate  # type: ignore[method-assign]
    HFBackend._ended = ended  # type: ignore[method-assign]


# --- TRL


def trl(gate: Gate, case: Case, folder: Path) -> None:
    from transformers import TrainerCallback

    class Waiting(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate()

    trainer = trl_trainer(case, folder, [Waiting()])
    note_trl(gate, trainer)
    if case.row == "same work":
        force_trl_lengths(trainer, case)
    trainer.train()


def trl_trainer(case: Case, folder: Path, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    settings = {
        **TRL,
        "output_dir": str(folder),
        "use_cpu": case.device == "cpu",
        "bf16": case.dtype == "bfloat16",
        "model_init_kwargs": {"dtype": "float32"},  # master weights; bfloat16 computes under autocast
        "num_generations": case.generations,
        "max_completion_length": case.max_length,
        "learning_rate": case.learning_rate,
        "max_steps": case.steps,
        **case.trl,
    }
    if settings.get("use_transformers_continuous_batching") and case.row == "same work":
        assert case.mean_length == case.max_length, "its continuous batching can only be made to go on to the limit"
        settings["generation_kwargs"] = {"eos_token_id": -1}
    if case.device == "cpu":  # otherwise its cache would take half of the machine's memory
        pages = case.prompts * case.generations * -(-(RECIPE["data"]["max_prompt_length"] + case.max_length) // 64)
        cache = {"page_size": 64, "num_blocks": pages, "max_batch_tokens": 4096}
        settings["transformers_continuous_batching_config"] = cache
    size = case.prompts * case.generations
    settings["gradient_accumulation_steps"] = size // settings["per_device_train_batch_size"]
    return GRPOTrainer(
        model=case.model,
        reward_funcs=[getattr(trl_case, trl_case.REWARDS[case.row])],
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list(case.rows()),
        processing_class=AutoTokenizer.from_pretrained(case.model),
        callbacks=callbacks,
    )


def note_trl(gate: Gate, trainer: Any) -> None:
    """The same notes on TRL's side. Time that is neither generation nor scoring is its update."""
    generate, make = trainer._generate_single_turn, trainer._generate_and_score_completions

    def timed_generate(*args: Any, **kwargs: Any) -> Any:
        with gate.phase("rollout"):
            return generate(*args, **kwargs)

    def noted_make(inputs: Any) -> Any:
        with gate.phase("rollout and score"):
            found = make(inputs)
        gate.notes["lengths"] = found["completion_mask"].sum(1).tolist()
        gate.notes["prompt_tokens"] = found["prompt_mask"].sum(1).tolist()
        groups = found["advantages"].view(-1, trainer.num_generations)
        gate.notes["groups_with_signal"] = int((groups != 0).any(1).sum())
        return found

    trainer._generate_single_turn, trainer._generate_and_score_completions = timed_generate, noted_make


def force_trl_lengths(trainer: Any, case: Case) -> None:
    """Forbid end-of-sequence before a completion's wanted length, and force it there."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class Forced(LogitsProcessor):
        def __init__(self, lengths: list[int], width: int):
            self.lengths, self.width = lengths, width
            self.last = [[i for i, n in enumerate(lengths) if n == t + 1] for t in range(case.max_length)]

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, trainer.eos_token_ids] = -torch.inf
            ends = self.last[input_ids.shape[1] - self.width]
            if ends:
                scores[ends] = -torch.inf
                scores[ends, trainer.eos_token_ids[0]] = 0.0
            return scores

    if trainer.use_transformers_continuous_batching:
        return  # continuous batching takes no processor; ``trl_trainer`` handles it
    generate = trainer.model.generate

    def forced_generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        forced = Forced(case.lengths(trainer.state.global_step), input_ids.shape[1])
        return generate(input_ids=input_ids, **kwargs, logits_processor=LogitsProcessorList([forced]))

    trainer.model.generate = forced_generate


SIDES = {"ours": ours, "trl": trl}
