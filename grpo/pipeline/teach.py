"""Rows with what a teacher says of them: its likeliest tokens at each token of the completion (``grpo teach``).

Rows are judged in blocks of a fixed size, in the recipe's order of rows, and a block is written whole. So a process
that is killed goes on behind the last whole block, and the file has the same bytes as if it had not been.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from grpo.config import Recipe
from grpo.errors import RunError, UserError
from grpo.files import write_whole
from grpo.model.teacher import Teacher, check_teacher, model_of, read_teacher
from grpo.packing import collate, plan_micro_batches
from grpo.prompts.rows import Part
from grpo.prompts.task import Task
from grpo.prompts.teacher_column import teacher_cell
from grpo.run.inputs import hash_inputs
from grpo.run.session import make_accelerator, prepare_task
from grpo.types import Example, TeacherSays, TrainedSequence

BLOCK = 64  # rows that are written together
TOKENS = 8192  # of a micro-batch, where the recipe names none
FACTS = "teach.json"


@dataclass(frozen=True)
class Written:
    """Files by part (``train``, ``eval``), their rows, and the mean probability that the likeliest tokens cover in the
    first of them."""

    files: dict[str, Path]
    rows: dict[str, int]
    covered: float


def teach(recipe: Recipe, folder: Path, top_k: int, *, column: str) -> Written:
    """Write ``train.jsonl`` and, where rows are held out, ``eval.jsonl`` into ``folder``: the recipe's rows with
    ``column``.

    Raises:
        UserError: the recipe has no teacher in the process, or the folder holds rows that were made otherwise.
        RunError: the disk refuses.
    """
    if recipe.stage != "sft" or recipe.teacher is None or recipe.teacher.name is None:
        raise UserError("grpo teach needs a recipe of stage sft with teacher: {name: ...}, the model that is asked")
    accelerator = make_accelerator(recipe)
    if accelerator.num_processes > 1:
        raise UserError("grpo teach runs in one process; start it without accelerate launch")
    tokenizer, _, task = prepare_task(recipe)
    check_teacher(recipe, tokenizer)
    facts = {
        "teacher": model_of(recipe.teacher).model_dump(),
        "top_k": top_k,
        "column": column,
        "inputs": hash_inputs(recipe, task),
    }
    _claim(folder, json.loads(json.dumps(facts)))
    teacher = read_teacher(recipe, accelerator)
    parts = {"train": task.train} | ({"eval": task.held_out} if len(task.held_out) else {})
    files = {name: folder / f"{name}.jsonl" for name in parts}
    try:
        for name, part in parts.items():
            _write(files[name], task, part, lambda examples: ask(teacher, examples, recipe, top_k), column)
    except OSError as error:
        raise RunError(f"{folder}: rows can't be written: {error.strerror or error}") from error
    return Written(files, {name: len(part) for name, part in parts.items()}, _covered(files["train"], column))


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Raise UserError where the folder holds rows that were made from something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / FACTS
        if not file.exists():
            if taken := sorted(folder.glob("*.jsonl")):
                raise UserError(f"{taken[0]} is there already, and not by grpo teach: choose another folder")
            write_whole(file, json.dumps(facts, indent=2) + "\n")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be written or read: {error}") from None
    if before != facts:
        differing = ", ".join(sorted(key for key in before.keys() | facts.keys() if before.get(key) != facts.get(key)))
        raise UserError(f"{folder} holds rows that were made with another {differing}: choose another folder")


def _write(
    file: Path, task: Task, part: Part, ask_of: Callable[[list[Example]], list[TeacherSays]], column: str
) -> None:
    """Write what is missing of a part's rows."""
    with file.open("a+b") as out:
        done = _whole_blocks(out, len(part))
        for start in range(done, len(part), BLOCK):
            block = part.ids[start : start + BLOCK]
            examples = [task.example(part, row) for row in block]
            says = ask_of(examples)
            cells = (teacher_cell(e.prompt, e.completion, of) for e, of in zip(examples, says, strict=True))
            rows = (dict(part.row(row)) | {column: cell} for row, cell in zip(block, cells, strict=True))
            out.write("".join(json.dumps(row, default=str) + "\n" for row in rows).encode())
            out.flush()
            os.fsync(out.fileno())


def _whole_blocks(out: BinaryIO, size: int) -> int:
    """Rows of a part of ``size`` rows in whole blocks at the file's start (the last block may be shorter). The file is
    cut behind them."""
    out.seek(0)
    lines = out.read().split(b"\n")[:-1]
    rows = size if len(lines) >= size else len(lines) - len(lines) % BLOCK
    out.truncate(sum(len(line) + 1 for line in lines[:rows]))
    out.seek(0, os.SEEK_END)
    return rows


def ask(teacher: Teacher, examples: list[Example], recipe: Recipe, top_k: int) -> list[TeacherSays]:
    """The teacher's ``top_k`` likeliest tokens at each token of every completion."""
    sequences = [TrainedSequence(e.prompt, e.completion, [0.0] * len(e.completion), 0.0) for e in examples]
    place_of = {id(s): i for i, s in enumerate(sequences)}
    found: list[TeacherSays] = [TeacherSays()] * len(examples)
    size = recipe.training.micro_batch_tokens or TOKENS
    (plan,) = plan_micro_batches(sequences, max_tokens=size, packed=teacher.packed)
    for micro_batch in plan:
        batch = collate(micro_batch, pad_token_id=0, device=teacher.device, packed=teacher.packed)
        ids_MK, logps_MK = teacher.likeliest(batch, min(top_k, teacher.vocab_size))
        of_rows = zip(*(_split(x, micro_batch) for x in (ids_MK, logps_MK)), micro_batch, strict=True)
        for ids, logprobs, s in of_rows:
            found[place_of[id(s)]] = TeacherSays((), ids, logprobs)
    return found


def _split(values_MK: torch.Tensor, micro_batch: list[TrainedSequence]) -> Iterator[list[list[Any]]]:
    for part in values_MK.split([len(s.completion_ids) for s in micro_batch]):
        yield part.tolist()


def _covered(file: Path, column: str) -> float:
    with file.open(encoding="utf-8") as lines:
        cell = json.loads(next(lines))[column]
    mass = [sum(torch.tensor(of_token).exp().tolist()) for of_token in cell["top_logprobs"]]
    return sum(mass) / max(len(mass), 1)
