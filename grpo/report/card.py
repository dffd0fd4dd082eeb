"""The model card: ``final/README.md``, with measured facts alone. Its front matter is what the hub reads.

A hub refuses metadata that is not YAML, and a license that nobody has given would be a claim; so the license is left
out. Paths of this machine are shortened to their last name, and secrets are not in a run's recipe to begin with.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grpo import __version__
from grpo.config import Recipe
from grpo.config.yaml_text import dump
from grpo.errors import first_line, printable
from grpo.run.read import RunRecord, headline, mapping, read_jsonl, read_run
from grpo.run.screen import duration

log = logging.getLogger("grpo")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
OUR_FOLDERS = ("data", "models", "runs")  # the first part of a name that means a folder, and no hub's organization
PRIVATE = {"training": ("output_dir",), "rollout": ("vllm_python", "vllm_sync_dir", "vllm_group_host")}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "vllm")


def card_at_end(model: Path) -> str | None:
    """``model_card`` of a folder that a run is writing, its ``final/`` or ``best/``. Where it can't be made, a line in
    the log and None: the model is there."""
    try:
        return model_card(model.parent, best=model.name == "best")
    except Exception as error:  # a mistake of ours must not cost the model
        log.warning("%s has no model card: %s", model, first_line(error))
        return None


def model_card(run: Path, *, best: bool = False) -> str:
    """The card of a run folder's model as it is now, as Markdown with YAML front matter. ``best``: it is the best so
    far.

    Raises UserError where the folder has no metrics, or a file in it is not what a run writes.
    """
    record = read_run(run)
    facts = headline(record)
    is_grpo = record.setting("stage", "grpo") == "grpo"
    given = _fenced(dump(given_keys(record.recipe)))
    parts = [
        f"---\n{dump(front_matter(record))}---\n",
        f"# {_plain(record.name)}\n",
        _what(record, is_grpo),
        _best(record) if best else "",
        _accuracy(record, facts),
        _length(record, facts),
        f"## Recipe\n\nKeys that differ from grpo's defaults:\n\n```yaml\n{given}```\n",
        _where(record),
    ]
    return "\n".join(part for part in parts if part)


def front_matter(record: RunRecord) -> dict[str, Any]:
    """What the hub reads of a card. A base model or a dataset is named only where its name is a hub's."""
    base, data = str(record.setting("model.name", "")), record.setting("data.hub")
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if is_hub_id(base):
        found["base_model"] = base
    if isinstance(data, str) and is_hub_id(data):
        found["datasets"] = [data]
    stage = "grpo" if record.setting("stage", "grpo") == "grpo" else "sft"
    return found | {"tags": ["grpo-train", stage, *(["lora"] if record.setting("model.lora") else [])]}


def is_hub_id(name: str) -> bool:
    """Whether a model's name can only mean a hub's: ``organization/name``, and nothing of that name here."""
    return (
        HUB_ID.fullmatch(name) is not None
        and name.partition("/")[0] not in OUR_FOLDERS
        and not name.endswith(".gguf")
        and not Path(name).exists()
    )


def given_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a resolved recipe is not a default, without keys that say where a machine keeps things."""
    try:
        given = Recipe.model_validate(recipe).model_dump(exclude_defaults=True)
    except ValidationError:
        given = dict(recipe)  # of another version, or with a secret left out: all that it says
    for section, keys in PRIVATE.items():
        if isinstance(given.get(section), dict):
            given[section] = {key: value for key, value in given[section].items() if key not in keys}
    shortened = _without_paths(given)
    return {key: value for key, value in shortened.items() if value != {}}


def _without_paths(value: Any) -> Any:
    """A JSON value in which an absolute path of this machine is its last name."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        return os.path.basename(value.rstrip("/"))
    return value


def _what(record: RunRecord, is_grpo: bool) -> str:
    base = _plain(str(_without_paths(record.setting("model.name", "a model"))))
    how = "GRPO (group relative policy optimization)" if is_grpo else "supervised training"
    adapters = " with LoRA adapters, which are merged" if record.setting("model.lora") else ""
    lines = [f"{base}, trained by {how}{adapters} with grpo-train {__version__}.\n"]
    source = next(
        (str(record.setting(f"data.{key}")) for key in ("name", "path", "hub") if record.setting(f"data.{key}")), ""
    )
    lines.append(
        f"- Task: `{_code(str(_without_paths(source)))}`, prompt template `{record.setting('data.template', 'none')}`"
    )
    if is_grpo and isinstance(record.recipe.get("rewards"), list):
        rewards = [mapping(reward) for reward in record.recipe["rewards"]]
        names = [str(reward.get("name") or _without_paths(str(reward.get("path")))) for reward in rewards]
        named = [f"`{_code(n)}` x {reward.get('weight', 1.0):g}" for n, reward in zip(names, rewards, strict=True)]
        lines.append(f"- Rewards: {', '.join(named)}")
    return "\n".join(lines) + "\n"


def _best(record: RunRecord) -> str:
    metric = _code(str(record.setting("training.save_best", "")))
    return f"It is the run's best model by `{metric}`, that of step {record.steps}; the run went on after it.\n"


def _accuracy(record: RunRecord, facts: dict[str, float]) -> str:
    steps, values = record.series("eval/accuracy")
    if not len(values):
        loss = [f"{when} {facts[f'loss_{when}']:.4f}" for when in ("before", "after") if f"loss_{when}" in facts]
        if record.setting("stage") == "sft" and len(loss) == 2:
            return f"## Result\n\nMean cross-entropy of a token, nats: {', '.join(loss)}.\n"
        return "## Result\n\nThis run held no rows out, so its accuracy was not measured.\n"
    lows, highs = record.series("eval/accuracy_low")[1], record.series("eval/accuracy_high")[1]
    rows = [
        f"| {when} (step {steps[i]:.0f}) | {values[i]:.3f} | {lows[i]:.3f} to {highs[i]:.3f} |"
        for when, i in ((("before", 0), ("after", -1)) if len(values) > 1 else (("after", -1),))
    ]
    evaluation = mapping(record.recipe.get("evaluation"))
    samples, temperature = evaluation.get("num_generations", 1), evaluation.get("temperature", 1.0)
    return (
        "## Result\n\nShare of held-out tasks solved, which were never trained on:\n\n"
        "| | accuracy | 95% interval |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"{_held_out(record, samples)} tasks, {samples} completion{'s' * (samples != 1)} each, temperature "
        f"{temperature:g}, at most "
        f"{evaluation.get('max_completion_length') or record.setting('rollout.max_completion_length')} tokens. The "
        "interval is of the sampling of tasks and completions. One seed of training says nothing of other seeds.\n"
    )


def _held_out(record: RunRecord, samples: int) -> str:
    """How many tasks the last evaluation had: by its completions, where they are kept."""
    if files := record.eval_rollouts():
        return str(sum(1 for _ in read_jsonl(list(files.values())[-1])) // samples)
    return f"At most {record.setting('data.eval_size')}"


def _length(record: RunRecord, facts: dict[str, float]) -> str:
    lines = [f"- Steps: {facts['steps']:.0f}"]
    if "tokens" in facts:
        lines.append(f"- Tokens of prompts and completions: {facts['tokens']:,.0f}")
    if "seconds" in facts:
        lines.append(f"- Time in training steps: {duration(facts['seconds'])} (evaluation and saving not counted)")
    if "cost_usd" in facts:
        price = record.setting("training.dollars_per_hour")
        lines.append(f"- Cost of that time: ${facts['cost_usd']:,.2f}, at ${price:g} an hour")
    if {"length_before", "length_after"} <= facts.keys():
        lines.append(
            f"- Mean completion, tokens: {facts['length_before']:.1f} before, {facts['length_after']:.1f} after"
        )
    lines.append(f"- Seed: {record.setting('training.seed', 0)}")
    return "## Training\n\n" + "\n".join(lines) + "\n"


def _where(record: RunRecord) -> str:
    environment = record.environment
    packages, cpu = mapping(environment.get("packages")), mapping(environment.get("cpu"))
    versions = [f"{name} {packages[name]}" for name in PACKAGES if name in packages]
    gpus = [mapping(gpu) for gpu in environment.get("gpus") or []]
    hardware = (
        ", ".join(f"{gpu.get('name')} ({gpu.get('memory_gb')} GB)" for gpu in gpus)
        or f"{cpu.get('model', 'a CPU')}, {cpu.get('cores', '?')} cores"
    )
    if not versions and not environment:
        return ""
    python = environment.get("python", "")
    commit = mapping(environment.get("source")).get("commit")
    lines = [
        f"- Hardware, as the first process saw it: {_plain(hardware)}",
        f"- Python {python}, {', '.join(versions)}",
    ]
    lines += [f"- grpo-train at commit {str(commit)[:12]}"] if commit else []
    return "## Where it ran\n\n" + "\n".join(_plain(line) for line in lines) + "\n"


def _plain(text: str) -> str:
    """A name in running Markdown: on one line, and of no meaning to Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(text).replace("\n", " "))


def _code(text: str) -> str:
    return printable(text).replace("\n", " ").replace("`", "'")


def _fenced(text: str) -> str:
    return printable(text).replace("```", "'''")
