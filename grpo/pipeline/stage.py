"""A stage's folder: what it was made from, how far it has come, and what it has made. Nothing of torch.

``stage.json`` holds a hash of everything that the stage is made from: the recipe (what of it is no default), options,
and the content of its inputs and of the files that it names. The version of grpo is written down and not part of it: an
update does not make a chain run again. A folder of another hash is moved aside (``NAME.previous``), never mixed with
the new.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from grpo import __version__
from grpo.errors import UserError
from grpo.files import write_whole
from grpo.pipeline.chain_file import Stage
from grpo.pipeline.fingerprints import digest, facts_of, hash_of, named_files
from grpo.run.same_run import differences
from grpo.run.secrets import given_without_secrets

STATE = "stage.json"
FORMAT = 1
# Keys of the recipe on which nothing depends that a stage makes.
NOT_HASHED = {
    "training": (
        *("output_dir", "save_every", "save_total_limit", "log_rollouts_every", "ddp_timeout", "peer_timeout"),
        *("replica_check_every", "dollars_per_hour"),
    ),
    "tracking": None,
    "expect": None,
}
MOST_REASONS = 3


@dataclass
class State:
    """What ``stage.json`` says."""

    hash: str
    inputs: dict[str, Any]
    status: str = "running"
    seconds: float = 0.0
    attempts: int = 0
    outputs: dict[str, dict[str, Any]] | None = None

    @classmethod
    def of(cls, folder: Path) -> State | None:
        """None where there is none, or one of a version that is not this one's."""
        try:
            values = json.loads((folder / STATE).read_bytes())
            if values.pop("format") != FORMAT:
                return None
            return cls(**{name: values[name] for name in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, stage: Stage) -> None:
        facts = {"format": FORMAT, "name": stage.name, "kind": stage.config.kind, "grpo": __version__}
        write_whole(stage.folder / STATE, json.dumps(facts | vars(self), indent=1) + "\n")


def inputs_of(stage: Stage, made: Mapping[str, str], launch: list[str]) -> dict[str, Any]:
    """Everything that a stage is made from, as JSON values. ``made`` are the hashes of what other stages have made, by
    their names. Raises UserError where a file that the recipe names cannot be read."""
    config, recipe = stage.config, given_without_secrets(stage.recipe)
    for section, keys in NOT_HASHED.items():
        if keys is None:
            recipe.pop(section, None)
        elif section in recipe:
            recipe[section] = {key: value for key, value in recipe[section].items() if key not in keys}
    places = {"from": ("model", "name"), "rows": ("data", "path"), "teacher": ("teacher", "name")}
    for what, other in config.inputs.items():
        section, key = places[what]
        recipe[section][key] = f"(stage {other})"  # wherever the chain's folder is
    options = {"n": config.n, "prompts": config.prompts, "pass_rate": config.pass_rate, "options": config.options}
    own = {"model": config.from_ is None, "rows": config.rows is None, "teacher": config.teacher is None}
    return {
        "kind": config.kind,
        "recipe": recipe,
        **{name: value for name, value in options.items() if value},
        **({"keep": config.rules} if config.kind == "sample" else {}),
        **({"launch": launch} if launch else {}),
        **{what: made[other] for what, other in config.inputs.items()},
        "files": named_files(stage.recipe, **own),
    }


def why(stage: Stage, state: State | None, inputs: Mapping[str, Any]) -> str | None:
    """Why a stage must be made, in words; None where it is there, made of these inputs."""
    if state is None:
        return "is new" if not stage.folder.exists() else f"has no {STATE} that can be read"
    if state.hash != digest(inputs):
        here = json.loads(json.dumps(inputs))
        found = differences(state.inputs, here)
        changed = [f"{key.removeprefix('recipe.')}: {old} -> {new}" for key, old, new in found]
        more = f" and {len(changed) - MOST_REASONS} more" if len(changed) > MOST_REASONS else ""
        return f"is made of something else ({'; '.join(_brief(one) for one in changed[:MOST_REASONS])}{more})"
    if state.status != "done":
        return "was not finished"
    return _lost(stage, state)


def _lost(stage: Stage, state: State) -> str | None:
    if stage.output is None:
        return None
    if not stage.output.exists():
        return f"has lost {stage.output.name}"
    found = facts_of(stage.output, state.outputs)
    changed = [name for name, of in (state.outputs or {}).items() if found.get(name, {}).get("sha256") != of["sha256"]]
    return f"has files that were changed since ({', '.join(changed)})" if changed else None


def made_by(state: State) -> str:
    """The hash of what a finished stage has made."""
    return hash_of(state.outputs or {})


class Making:
    """A stage under way: its folder made ready, and the seconds counted over all attempts."""

    def __init__(self, stage: Stage, inputs: dict[str, Any], before: State | None) -> None:
        self.stage = stage
        known = before is not None and before.hash == digest(inputs) and before.status != "done"
        if stage.folder.exists() and not known:
            _move_aside(stage.folder)
        try:
            stage.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: {stage.folder} cannot be made: {error.strerror or error}") from error
        self.state = before if before is not None and known else State(digest(inputs), inputs)
        self.state.attempts += 1
        self.before, self.began = self.state.seconds, monotonic()
        self.tick()

    def tick(self) -> None:
        """Write down the seconds so far: a kill loses the last few alone."""
        self.state.seconds = round(self.before + monotonic() - self.began, 3)
        self.state.write(self.stage)

    def done(self) -> State:
        output = self.stage.output
        self.state.outputs = facts_of(output) if output is not None else {}
        self.state.status = "done"
        self.tick()
        return self.state


def command_of(stage: Stage, launch: list[str]) -> list[str]:
    """What makes a stage, or goes on with it."""
    config, arguments = stage.config, [str(stage.file), *stage.overrides]
    if config.makes == "model":
        what = ["train", *arguments, *(["--resume"] if (stage.folder / "run").exists() else [])]
    elif config.kind == "sample":
        what = ["sample", *arguments, "--keep", ",".join(config.rules), *_option("n", config.n or 16)]
        what += [*_option("prompts", config.prompts), "--output", str(stage.output)]
    else:
        what = ["data", "filter", *arguments, *_option("n", config.n), *_option("pass-rate", config.pass_rate)]
        what += [part for name, value in config.options.items() for part in _option(name, value)]
        what += ["--output", str(stage.output)]
    return [*(launch or [sys.executable]), "-m", "grpo", *what]


def _option(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def _move_aside(folder: Path) -> None:
    previous = folder.with_name(f"{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    folder.rename(previous)


def _brief(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:79]}…"
