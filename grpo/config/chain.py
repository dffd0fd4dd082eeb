"""A chain: named stages, each a recipe with overrides, whose inputs are other stages' models and rows (``grpo run``).

The schema alone, without torch. ``chain_file.py`` reads a file and finds what is wrong with every stage at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from grpo.config.base import LocalPath, NonEmpty, NonNegative, NonNegativeInt, PositiveInt, Problem, Section, refuse

Makes = Literal["model", "rows", None]


@dataclass(frozen=True)
class Kind:
    """What a kind of stage is made of: the recipe's stages that it takes, the inputs and options it may have, and those
    it needs; what it makes."""

    stages: tuple[str, ...]
    may: frozenset[str]
    needs: frozenset[str]
    makes: Makes


def _kind(stages: str, may: str, needs: str, makes: Makes) -> Kind:
    return Kind(tuple(stages.split()), frozenset(f"{may} {needs}".split()), frozenset(needs.split()), makes)


KINDS = {
    "sft": _kind("sft", "from rows launch", "", "model"),
    "grpo": _kind("grpo", "from rows launch", "", "model"),
    "distill": _kind("sft grpo", "from rows teacher launch", "", "model"),
    "sample": _kind("grpo sft", "from rows n keep prompts launch", "", "rows"),
    "filter": _kind("grpo sft", "from rows n pass_rate options launch", "", "rows"),
    "eval": _kind("grpo sft", "rows launch", "from", None),
}


class StageConfig(Section):
    kind: Literal["sft", "grpo", "distill", "sample", "filter", "eval"]
    """`sft` and `grpo` train; `distill` trains with the recipe's `teacher` section; `sample` is `grpo sample`, `filter`
    is `grpo data filter`; `eval` measures the model of another stage on its own recipe's held-out tasks."""
    recipe: NonEmpty
    """A file (beside the chain's, or from where grpo is started) or the name of a recipe that grpo ships."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe with their values: `{training.max_steps: 100}`."""
    from_: str | None = Field(default=None, alias="from")
    """The stage whose model this one begins with; null is the recipe's own `model.name`."""
    rows: str | None = None
    """The stage whose rows are this one's data; null is the recipe's own."""
    teacher: str | None = None
    """With `distill`: the stage whose model is the teacher; null is the recipe's own."""
    n: PositiveInt | None = None
    """With `sample` and `filter`: completions a prompt."""
    keep: NonEmpty | list[NonEmpty] | None = None
    """With `sample`: the rules, as `grpo sample --keep` has them."""
    prompts: PositiveInt | None = None
    """With `sample`: rows to sample for; null is all to train on."""
    pass_rate: NonEmpty | None = None
    """With `filter`: the window of pass rates that is kept, such as 0.1..0.9."""
    options: dict[NonEmpty, Any] = Field(default_factory=dict)
    """With `filter`: further options of `grpo data filter`, without the dashes."""
    launch: list[NonEmpty] | None = None
    """What starts this stage on several processes, in place of the chain's `launch`."""

    def given(self) -> set[str]:
        """The inputs and options that are given."""
        names = {"from": self.from_} | {
            name: getattr(self, name) for name in StageConfig.model_fields if name != "from_"
        }
        return {name for name, value in names.items() if value} - {"kind", "recipe", "overrides"}

    @property
    def inputs(self) -> dict[str, str]:
        """The names of other stages, by what of them is used: `from`, `rows`, `teacher`."""
        named = {"from": self.from_, "rows": self.rows, "teacher": self.teacher}
        return {what: name for what, name in named.items() if name}

    @property
    def makes(self) -> Makes:
        return KINDS[self.kind].makes

    @property
    def rules(self) -> list[str]:
        """What is kept of the samples, rule by rule."""
        return self.keep if isinstance(self.keep, list) else (self.keep or "correct").split(",")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> StageConfig:
        kind, given = KINDS[self.kind], self.given()
        problems = [
            Problem((name, "kind"), f"{name} is not used with kind: {self.kind}") for name in sorted(given - kind.may)
        ]
        problems += [Problem((name, "kind"), f"kind: {self.kind} needs {name}") for name in sorted(kind.needs - given)]
        refuse(problems)
        return self


class MeasureConfig(Section):
    recipe: NonEmpty
    """Its held-out tasks, rewards and `evaluation` section; its model is not used."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe with their values: `{data.eval_size: 500}`."""
    seeds: list[NonNegativeInt] = Field(default_factory=lambda: [0], min_length=1)
    """Each is a `training.seed` to evaluate with. A task whose rows depend on it holds out others for each."""
    form: str | None = None
    """The reward of the recipe that measures how readable an answer is, by its name. Give it weight 0: what is reported
    as form should not be what a stage was paid for."""
    at_start: bool = False
    """Measure the model that the first stage begins with, too."""

    @field_validator("seeds")
    @classmethod
    def _none_twice(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice")
        return seeds


class Chain(Section):
    output_dir: LocalPath
    """The chain's folder: one for each stage, `summary.json` and `report.html`."""
    seed: NonNegativeInt | None = None
    """`training.seed` of every stage that does not override it; null leaves the recipes' own."""
    launch: list[NonEmpty] = Field(default_factory=list)
    """What starts a stage on several processes: `[accelerate, launch, --config_file, launch/ddp.yaml]`. Empty is one
    process."""
    dollars_per_hour: NonNegative | None = None
    """Price of the machine: the summary then says what each stage has cost."""
    evaluate: MeasureConfig | None = None
    """Held-out tasks on which every stage's model is measured."""
    stages: dict[NonEmpty, StageConfig] = Field(min_length=1)
    """The stages by their names, in the order in which they run."""
