"""A file of scored groups, a line a prompt, and the header beside it, which says what they were sampled from.

Groups are appended in whole chunks. Whoever opens the file again cuts off what a killed process has left of a chunk,
and goes on behind the last whole one. ``FILE.header.json`` holds the identity of what was sampled: other rows, another
model or another recipe are refused. Neither file has a time in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from grpo.config import Recipe
from grpo.errors import RunError, UserError
from grpo.files import write_whole
from grpo.metrics import episode_row
from grpo.run.same_run import changed_inputs, changes, log
from grpo.run.secrets import given_without_secrets
from grpo.types import Group

OF_SAMPLING = ("model", "data", "rewards", "rollout", "scoring")  # sections of the recipe that a sample depends on


def sample_row(group: Group) -> dict[str, Any]:
    """A group as it is in the file."""
    prompt = group.prompt
    return {
        "prompt_id": prompt.id,
        **({"source": prompt.source} if prompt.source else {}),
        "prompt": prompt.prompt,
        "text": prompt.text,
        "prefill": prompt.prefill,
        "prompt_ids": list(prompt.token_ids),
        "columns": prompt.columns,
        "completions": [
            {
                "sample": g,
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "status": completion.status.value,
                "reward": group.rewards[g],
                "rewards": {name: values[g] for name, values in group.rewards_by_function.items()},
                "verdicts": {name: said[g] for name, said in group.said.items()},
                **episode_row(completion),
            }
            for g, completion in enumerate(group.completions)
        ],
    }


def header_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.header.json")


def read_header(file: Path) -> dict[str, Any]:
    """The identity of what is in ``file``. Raises UserError where there is none."""
    try:
        return json.loads(header_of(file).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: nothing was sampled into it ({header_of(file).name} is not there)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{header_of(file)}: cannot be read: {error}") from error


def read_samples(file: Path) -> Iterator[dict[str, Any]]:
    """The groups of a finished file, as ``sample_row`` made them."""
    with file.open("rb") as opened:
        for line in opened:
            yield json.loads(line)


def model_hash(header: Mapping[str, Any]) -> str:
    """One hash of all files of the model and its tokenizer."""
    return _hash({name: value for name, value in header["inputs"].items() if name.startswith("model.")})


def recipe_hash(header: Mapping[str, Any]) -> str:
    """A hash of all of the recipe that a sample depends on, rows and code of the user's included. Where model and rows
    lie is not in it, what they are is (the model by ``model_hash``)."""
    recipe = {section: dict(of) if isinstance(of, dict) else of for section, of in header["recipe"].items()}
    for section, key in (("model", "name"), ("model", "tokenizer"), ("data", "path"), ("data", "eval_path")):
        recipe[section].pop(key, None)
    inputs = {name: value for name, value in header["inputs"].items() if not name.startswith("model.")}
    return _hash([recipe, header["wanted"], inputs])


def of_sampling(recipe: Recipe, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's identity (``run.state.identity_on``) a sample depends on. Of the recipe it is what is no default:
    an update that brings further keys refuses nothing."""
    given = given_without_secrets(recipe)
    kept = {name: given.get(name, {}) for name in OF_SAMPLING}
    if given.get("environment"):
        kept["environment"] = given["environment"]
    rollout = {name: value for name, value in kept["rollout"].items() if name != "num_generations"}
    return {**identity, "recipe": kept | {"rollout": rollout, "training": {"seed": recipe.training.seed}}}


class SampleFile:
    """The file, for the one process that writes it. Close it, or use it as a context manager."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._opened = ExitStack()

    def begin(self, header: Mapping[str, Any], prompt_ids: Sequence[int], chunk: int) -> int:
        """Open the file for these prompts, and cut off what is no whole chunk. Returns how many prompts are done.

        Raises UserError, having changed nothing, where it holds other samples or a live process writes it.
        """
        header = json.loads(json.dumps(header))
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._lines = self._opened.enter_context(self.file.open("a+b"))
        except OSError as error:
            raise UserError(f"{self.file}: cannot be written: {error.strerror or error}") from error
        self._lock(self._lines)
        if not os.fstat(self._lines.fileno()).st_size:  # of a process that failed before its first chunk, too
            write_whole(header_of(self.file), json.dumps(header, indent=1) + "\n")
        elif header_of(self.file).exists():
            self._check(read_header(self.file), header)
        else:
            raise UserError(f"{self.file}: is there already, and has no {header_of(self.file).name}: give another file")
        return self._cut(prompt_ids, chunk)

    def append(self, groups: Sequence[Group]) -> None:
        """Add a chunk. Raises RunError where the disk refuses."""
        try:
            for group in groups:
                self._lines.write(json.dumps(sample_row(group), default=str).encode() + b"\n")
            self._lines.flush()
            os.fsync(self._lines.fileno())
        except OSError as error:
            raise RunError(
                f"{self.file}: cannot be written: {error.strerror or error}; the same command goes on"
            ) from error

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self, opened: BinaryIO) -> None:
        """The kernel's lock: it is gone with the process that holds it."""
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.file}: another process is sampling into it") from None
        except OSError as error:
            log.warning("%s cannot be locked on this filesystem (%s): never sample into it twice", self.file, error)

    def _check(self, before: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        refused, warned = changes(before, header)
        refused += changed_inputs(before.get("inputs"), header.get("inputs"))
        if refused:
            raise UserError(
                f"{self.file} holds samples of something else; it differs in\n  "
                + "\n  ".join(refused)
                + f"\nSample into another file, or remove this one and {header_of(self.file).name}."
            )
        if warned:
            log.warning("%s: sampling goes on with changes, not equal to the bit: %s", self.file, "; ".join(warned))

    def _cut(self, prompt_ids: Sequence[int], chunk: int) -> int:
        """Keep the whole chunks. Raises UserError where a line is another prompt's."""
        done, whole, size = 0, 0, 0
        self._lines.seek(0)
        for line in self._lines:
            found = _prompt_id(line)
            if found is None:
                break
            if done >= len(prompt_ids) or found != prompt_ids[done]:
                raise UserError(
                    f"{self.file}:{done + 1}: is of prompt {found}, not the one that was asked for: remove it"
                )
            done, size = done + 1, size + len(line)
            if done % chunk == 0 or done == len(prompt_ids):
                whole = size
                complete = done
        self._lines.truncate(whole)
        return complete if whole else 0


def _prompt_id(line: bytes) -> int | None:
    """Of a line; None of one that was not written to its end."""
    try:
        return json.loads(line)["prompt_id"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
