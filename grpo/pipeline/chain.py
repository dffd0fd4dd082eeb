"""A chain run to its end: each stage that is not there yet, or is made of something else than now, in its order.

Every stage runs in a process of its own. This one holds no model: it decides, waits, and writes the summary. Killed
anywhere and started again, it goes on, and ends with the same weights and rows as a chain that nobody disturbed.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.files import write_whole
from grpo.pipeline import child
from grpo.pipeline.chain_file import START, Measure, Plan, Stage
from grpo.pipeline.fingerprints import digest, facts_of, hash_of, named_files
from grpo.pipeline.stage import Making, State, command_of, inputs_of, made_by, why
from grpo.pipeline.summary import write_summary
from grpo.run.folder import is_running, lock_folder, release_run_folder
from grpo.run.secrets import given_without_secrets

log = logging.getLogger("grpo")

REQUEST = "evaluation.request.json"
RESULT = "evaluation.json"
SECONDS_TO_END = 60.0  # for the process of a stage whose chain was killed


def dry_run(plan: Plan) -> Iterator[str]:
    """What a run of the chain would do with each stage, and why. Changes nothing."""
    made: dict[str, str] = {}
    for stage in plan.stages:
        waits = [other for other in stage.config.inputs.values() if other not in made]
        state = State.of(stage.folder)
        if waits:
            reason: str | None = f"depends on {' and '.join(dict.fromkeys(waits))}"
        else:
            reason = why(stage, state, inputs_of(stage, made, _launch(plan, stage)))
        if reason is None and state is not None:
            made[stage.name] = made_by(state)
        does = "is there" if reason is None else "would go on" if reason == "was not finished" else "would run"
        yield f"{stage.name} ({stage.config.kind}) {does}" + (f": it {reason}" if reason else "")


def run_chain(plan: Plan) -> dict[str, Any]:
    """Run what is missing. Returns the summary, which is in ``summary.json`` too.

    Raises:
        UserError: a stage is wrong, or a live process runs in the chain's folder.
        RunError: a stage failed; the message names it.
    """
    _check_programs(plan)
    with _locked(plan.folder):
        made: dict[str, str] = {}
        if plan.measure is not None and plan.chain.evaluate is not None and plan.chain.evaluate.at_start:
            _measure_start(plan, plan.measure)
        for place, stage in enumerate(plan.stages, 1):
            launch = _launch(plan, stage)
            state, is_new = _make(plan, stage, made, launch, f"stage {place} of {len(plan.stages)}")
            made[stage.name] = made_by(state)
            if plan.measure is not None and stage.config.makes == "model":
                model = str(stage.output)
                is_new |= _measure(plan.measure, stage.folder, model, made[stage.name], stage.name, launch)
            if is_new and place < len(plan.stages):
                write_summary(plan)
        return write_summary(plan)


def _make(plan: Plan, stage: Stage, made: dict[str, str], launch: list[str], place: str) -> tuple[State, bool]:
    """The stage's state when it is there, and whether it was made now."""
    inputs, before = inputs_of(stage, made, launch), State.of(stage.folder)
    reason = why(stage, before, inputs)
    what = f"{stage.name} ({stage.config.kind})"
    if reason is None and before is not None:
        log.info("%s: %s is there", place, what)
        return before, False
    log.info("%s: %s %s", place, what, reason)
    _wait_for(stage.folder / "run")
    making = Making(stage, inputs, before)
    if stage.config.kind == "eval":
        command = _request(_measure_of(stage), stage.folder, str(_model_of(plan, stage)), digest(inputs), launch)
    else:
        command = command_of(stage, launch)
    child.run(command, f"stage {what}", making.tick)
    return making.done(), True


def _launch(plan: Plan, stage: Stage) -> list[str]:
    return plan.chain.launch if stage.config.launch is None else stage.config.launch


def _model_of(plan: Plan, stage: Stage) -> Path | None:
    return plan.stage(str(stage.config.from_)).output


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(measure: Measure, folder: Path, model: str, model_hash: str, name: str, launch: list[str]) -> bool:
    """Measure a model, unless it was, on these tasks. Returns whether it was measured now."""
    wanted = digest([_identity(measure), model_hash])
    try:
        if json.loads((folder / RESULT).read_bytes())["hash"] == wanted:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.info("measuring %s", name)
    child.run(_request(measure, folder, model, wanted, launch), f"measuring {name}")
    return True


def _measure_start(plan: Plan, measure: Measure) -> None:
    """Measure what the first stage begins with."""
    first, folder = plan.stages[0], plan.folder / START
    name = first.recipe.model.name
    facts = hash_of(facts_of(Path(name))) if Path(name).exists() else f"{name}@{first.recipe.model.revision}"
    folder.mkdir(parents=True, exist_ok=True)
    _measure(measure, folder, name, facts, START, _launch(plan, first))


def _identity(measure: Measure) -> dict[str, Any]:
    recipe = given_without_secrets(measure.recipe)
    parts = ("data", "rewards", "rollout", "evaluation", "scoring")
    return {
        "recipe": {name: recipe.get(name) for name in parts} | {"dtype": measure.recipe.model.dtype},
        "seeds": measure.seeds,
        "form": measure.form,
        "files": named_files(measure.recipe, model=False, rows=True, teacher=False),
    }


def _measure_of(stage: Stage) -> Measure:
    """An eval stage's own recipe as what measures."""
    return Measure(stage.file, stage.overrides, stage.recipe, (stage.recipe.training.seed,), None)


def _request(measure: Measure, folder: Path, model: str, wanted: str, launch: list[str]) -> list[str]:
    """Write what is asked of the process; returns the command that starts it."""
    own = ["model.lora=null", "model.load_in_4bit=false", "model.revision=null", f"model.name={json.dumps(model)}"]
    asked = {
        "recipe": str(measure.file),
        "overrides": [*measure.overrides, *own],
        "seeds": list(measure.seeds),
        "form": measure.form,
        "hash": wanted,
    }
    write_whole(folder / REQUEST, json.dumps(asked, indent=1) + "\n")
    return [*(launch or [sys.executable]), "-m", "grpo", "measure", str(folder / REQUEST)]


# --- the folder ------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock_folder(folder, "output_dir")
    try:
        yield
    finally:
        release_run_folder(folder)


def _wait_for(run: Path) -> None:
    """Wait for the process of a stage whose chain was killed: it saves what it has, and ends."""
    until = time.monotonic() + SECONDS_TO_END
    while is_running(run) and time.monotonic() < until:
        time.sleep(0.2)


def _check_programs(plan: Plan) -> None:
    launches = {program[0] for stage in plan.stages if (program := _launch(plan, stage))}
    if missing := sorted(program for program in launches if shutil.which(program) is None):
        raise UserError(f"launch: there is no program {', '.join(missing)} here")
