"""docs/models.md, from what was measured."""

from __future__ import annotations

import transformers

from benchmarks.families.architectures import Case
from benchmarks.families.measure import LONGEST, NEAR, Found

Row = tuple[Case, list[Found]]  # trained whole, and with LoRA
HEAD = """# Models

This page is written by `python -m benchmarks.families`, with transformers {version} on a CPU with a compiler. It makes
a tiny model with random weights of each architecture, trains it two steps with `rollout.backend: hf`, whole and with
LoRA on all linear layers, and writes `final/`. Then the sampler's log-probabilities and the update's (all rows in one
micro-batch, and each alone) are compared with the model's own: `final/` is loaded into transformers' classes, and each
row is computed alone. Windows and chunks are 8 tokens, ropes are made for 32, rows have up to {longest} tokens.
*right*: all agree to {near} nats, in float32.

- **update**: *packed* rows hold a prompt once for all of its completions; *padded* rows, with the reason, are slower.
- **decoding**: *compiled*, one compiled call a step (without adapters; on a GPU every family but those with a cache of
  their own decodes by one CUDA graph a step); *modules*, through transformers' modules; *own cache*, through
  transformers' own cache, for models with recurrent layers.

At start, every run makes the same comparisons with its own model on made-up tokens, beyond the windows that its rows
pass. A model that fails one is refused with a message that names its class. `rollout.backend: vllm` samples from what
the installed vLLM supports, and its log-probabilities are compared after each sync ([backends.md](backends.md)).

{right} of {all} cases are right, whole and with LoRA.

| architecture | class | update | decoding | whole | LoRA |
|---|---|---|---|---|---|
"""


def page(rows: list[Row], unmeasured: list[Case] | None = None) -> str:
    good = [row for row in rows if any(found.status == "right" for found in row[1])]
    both = sum(all(found.status == "right" for found in row[1]) for row in rows)
    text = HEAD.format(version=transformers.__version__, longest=LONGEST, near=NEAR, right=both, all=len(rows))
    text += "".join(_line(*row) for row in good)
    for status, title in [("refused", "Refused"), ("wrong", "Not right"), ("failed", "Failing")]:
        found = [(case, way, one) for case, ones in rows for way, one in zip(("whole", "LoRA"), ones, strict=True)]
        found = [(case, way, one) for case, way, one in found if one.status == status]
        if found:
            text += f"\n## {title}\n\n" + "".join(_reasons(found))
    if unmeasured:
        text += "\n## Not measured yet\n\n" + "".join(f"- {_name(case)}\n" for case in unmeasured)
    return text


def _name(case: Case) -> str:
    return f"{case.kind} ({case.note})" if case.note else case.kind


def _line(case: Case, found: list[Found]) -> str:
    one = next(f for f in found if f.status == "right")
    cells = [_name(case), one.model, _update(one), _decoding(one), *(f.status for f in found)]
    return "| " + " | ".join(cells) + " |\n"


def _update(found: Found) -> str:
    if found.update.startswith("packed"):
        return "packed"
    return "padded: " + found.update.partition(": ")[2]


def _decoding(found: Found) -> str:
    if found.decoding.startswith("one compiled call"):
        return "compiled"
    if "own cache" in found.decoding:
        return "own cache" + (", prompts of equal length together" if "equal length" in found.decoding else "")
    return "modules"


def _reasons(found: list[tuple[Case, str, Found]]) -> list[str]:
    """A line for each reason, with the ways of training that it holds for."""
    lines: dict[tuple[str, str], list[str]] = {}
    for case, way, one in found:
        lines.setdefault((f"**{_name(case)}** {one.model}".strip(), one.why.replace("\n", " ")), []).append(way)
    return [f"- {name}{'' if len(ways) == 2 else f' ({ways[0]})'}: {why}\n" for (name, why), ways in lines.items()]
