"""``docs/recipe.md`` from the schema: ``python -m grpo.config.docs > docs/recipe.md``. A test holds them equal."""

from __future__ import annotations

from typing import Any, get_origin

from pydantic_core import PydanticUndefined

from grpo.config.base import Section
from grpo.config.hints import RENAMED, REPEATS, repeats, section_in, sections
from grpo.config.resume import on_resume
from grpo.config.yaml_text import dump

EXAMPLE = """\
stage: grpo                       # or sft: imitate a column instead of learning from rewards
model:
  name: Qwen/Qwen2.5-0.5B         # hub id, folder, another run's final/, or a GGUF file
data:
  name: countdown                 # a task of data/; or path: tasks.jsonl, or hub: owner/dataset
  template: r1_zero
rewards:
  - {name: countdown, weight: 1.0}
  - {name: format, weight: 0.1}
rollout:
  num_generations: 8              # completions per prompt
  max_completion_length: 1024
optimizer:
  learning_rate: 1e-6
training:
  output_dir: runs/countdown
  prompts_per_step: 32
  max_steps: 500
"""

INTRODUCTION = f"""\
# The recipe

One YAML file describes one run. This page is made from the schema (`python -m grpo.config.docs > docs/recipe.md`).

```yaml
{EXAMPLE}```

```
grpo validate recipe.yaml                     # schema and data rows, without weights or network
grpo audit recipe.yaml                        # the rewards on those rows: right answers paid, cheats not
grpo train recipe.yaml                        # or: accelerate launch --num_processes 2 -m grpo train recipe.yaml
grpo train recipe.yaml --resume               # go on from the newest checkpoint that verifies
grpo train recipe.yaml --dry-run              # check everything but the weights, print the resolved recipe
grpo eval runs/countdown                      # the run's final model on its held-out tasks
grpo report runs/countdown                    # curves and a self-contained HTML page
grpo recipes                                  # the recipes that grpo ships; show NAME prints one, copy NAME copies it
```

Every command that takes a recipe takes the name of a shipped one too: `grpo train smoke_cpu`, from any folder. A file
of that name in the working directory wins, and a line says so.

**Overrides** follow the recipe as `KEY=VALUE`, with the value in YAML: `rollout.temperature=0.8`,
`rewards.0.weight=0.5`, `model.lora.r=64` (makes the section), `rollout.stop='["</answer>"]'`,
`training.max_seconds=null`. The resolved recipe is written to `OUTPUT_DIR/recipe.yaml` and can be trained again.

**YAML as people mean it**: `1e-6` is a number; only `true` and `false` are booleans, so `wandb: off` needs no quotes; a
key given twice is an error.

**Mistakes** are reported all at once, each with its line or its override, before anything heavy is loaded:

```
recipe.yaml:14: optimizer.learning_rat: unknown key, did you mean learning_rate?
override rollout.num_generations=1: must be at least 2, got 1. Completions per prompt, G. [...]
```

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | the recipe, the data or the command line is wrong |
| 3 | `grpo probe`, or `grpo train --probe`: a run would not learn; why, and what to do, is said |
| 143 | preempted (SIGTERM, SIGUSR1, SIGHUP), and saved what there was: start again with `--resume` |
| 130 | Ctrl-C: once, the step is finished and saved; twice, the run ends now, and saves the last step if it can |
| 1 | anything else; the last line says what to do; a traceback, if there is one, is in `OUTPUT_DIR/error.txt` |

**What may change on `--resume`** is the column *on resume* below. A run goes on from a checkpoint with the recipe
given now. Keys that are `free` change nothing that is computed. Those that say `warns` change results from then on, by
rounding or because they are the learning rate, and a line says so. Others are `refused` by name (exit code 2): it would
be another run. Where `training.max_steps` or a key of the schedule moves the learning rate of the next step, a line
says from what to what.

- Another number of processes, sharded or not, is the same run to rounding, and a line says so. On the same number it
  goes on to the bit.
- Checkpoints hold hashes of what the run is made from: the rows, the files of the model, its tokenizer and chat
  template (of a hub, the commit), and the source of rewards, losses and backends given by path, with what these import
  from beside them. What has changed is refused by name; `--allow-changed-inputs` goes on with what is there now. Files
  that such code only reads are not seen, unless an argument of the reward names them. Checkpoints from before there
  were hashes are not compared. Hashing takes 0.6 s of CPU for SmolLM2-135M in float32 (538 MB) and 10 MB of JSON lines
  (60,000 rows).
- Where checkpoints exist and none verifies, or one cannot be read, or a run is so far that there must have been one,
  the command says so of each of them, changes nothing and exits with 2. Without any, and before the first was due, it
  starts at step 0 and says so.
"""


def recipe_markdown() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, section in sections().items():
        if all(repeats(name, key) for key in section.model_fields):
            continue
        title = f"## `{name}`" if name else "## Top level"
        about = _about(name)
        parts.append("\n".join([title, "", *([about, ""] if about else []), *_table(name, section)]) + "\n")
    parts.append(_foreign_names())
    return "\n".join(parts)


def _about(name: str) -> str:
    above, _, key = name.rpartition(".")
    field = sections()[above].model_fields.get(key) if name else None
    if field is None:
        return ""
    note = dict.fromkeys(("rewards", "expect"), " Keys of each item:").get(name, "")
    if name in REPEATS:
        keys = [f"`{key}`" for key in sections()[name].model_fields if repeats(name, key)]
        note = f" Each item has {', '.join(keys)}, as `{REPEATS[name]}` explains them, and:"
    return _one_line(field.description) + note


def _table(name: str, section: type[Section]) -> list[str]:
    schema = section.model_json_schema()
    lines = ["| key | type | default | on resume | meaning |", "|---|---|---|---|---|"]
    for key, field in section.model_fields.items():
        if repeats(name, key):
            continue
        if section_in(field) and get_origin(field.annotation) is list:
            kind, default = "list of sections", "" if not name else "`[]`"
        elif section_in(field) and (section.__name__ == "Recipe" or field.default_factory is not None):
            kind, default = "section", ""
        elif section_in(field):
            kind, default = "section or null", "`null`"
        else:
            kind, default = _type(schema["properties"][key]), _default(field)
        if field.is_required():
            default = "**required**"
        resume = "" if kind == "section" else on_resume(f"{name}.{key}".lstrip("."))
        lines.append(f"| `{key}` | {kind} | {default} | {resume} | {_cell(_one_line(field.description))} |")
    return lines


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{choice}`" for choice in schema.get("enum") or [schema["const"]])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    names = {
        "string": "text",
        "number": "number",
        "integer": "integer",
        "boolean": "true or false",
        "object": "mapping",
    }
    name = names.get(schema.get("type", ""), schema.get("type", "any"))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[bound]:g}" for bound, sign in bounds.items() if bound in schema]
    return " ".join([name, ", ".join(limits)]).strip()


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    text = dump(value).removesuffix("\n").removesuffix("\n...")
    return f"`{text}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _foreign_names() -> str:
    lines = [
        "## Names from TRL, verl and OpenRLHF",
        "",
        "Where the meaning is TRL's, so is the name, in the section it belongs to. Others are refused with a hint:",
        "",
        "| there | here | |",
        "|---|---|---|",
    ]
    for name, place in RENAMED.items():
        key, _, note = place.partition(": ")
        lines.append(f"| `{name}` | `{key}` | {_cell(note)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(recipe_markdown(), end="")
