"""The recipe's section ``evaluation``: how held-out rows are sampled, and which suites are evaluated beside them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from grpo.config.base import LocalPath, NonNegative, NonNegativeInt, PositiveInt, Problem, Section, refuse
from grpo.config.suites import is_file, suite_names, unknown_suite

TopP = Annotated[float, Field(gt=0, le=1)]


class SuiteSamplingConfig(Section):
    num_generations: PositiveInt | None = None
    """Completions per question of a suite; null is the suite's own number (docs/evaluation.md)."""
    temperature: NonNegative | None = None
    """Sampling temperature; 0 is greedy, with one completion; null is the suite's own."""
    top_p: TopP | None = None
    """Nucleus sampling; null is the suite's own."""
    max_completion_length: PositiveInt | None = None
    """Longest completion in tokens; null is the suite's own, but no more than the model has positions for and, during
    a run, no more than the recipe's longest."""
    rows: PositiveInt | None = None
    """The first so many rows of a suite, to try it; null is all."""


class EvaluationConfig(Section):
    num_generations: PositiveInt = 1
    """Completions per held-out prompt; pass@1 is their mean, pass@k for k up to this."""
    temperature: NonNegative = 1.0
    """Sampling temperature of evaluation; 0 is greedy."""
    top_p: TopP = 1.0
    """Nucleus sampling of evaluation; 1.0 is off."""
    max_completion_length: PositiveInt | None = None
    """Longest completion in evaluation; null takes the rollout's."""
    reward: str | None = None
    """Reward whose value 1 counts as solved; null takes the first of `rewards`."""
    at_start: bool = True
    """Evaluate before the first step."""
    suites: list[LocalPath] = Field(default_factory=list)
    """Suites to evaluate beside the held-out rows: names (`math500`, `aime24`, `humaneval`, …; docs/evaluation.md lists
    them) or files of yours (`my_suite.yaml`). They are evaluated before the first step, with `at_start`, and at the
    end; results go into OUTPUT_DIR/eval."""
    suites_every: NonNegativeInt = 0
    """Evaluate the suites every so many steps too; 0: only at the start and at the end."""
    suite_sampling: SuiteSamplingConfig = Field(default_factory=SuiteSamplingConfig)
    """What takes the place of the suites' own sampling."""

    @model_validator(mode="after")
    def _fits(self) -> EvaluationConfig:
        problems = []
        if self.temperature == 0 and self.num_generations > 1:
            problems.append(Problem(("temperature", "num_generations"), greedy_once(self.num_generations)))
        sampling = self.suite_sampling
        if sampling.temperature == 0 and (sampling.num_generations or 1) > 1:
            keys = ("suite_sampling.temperature", "suite_sampling.num_generations")
            problems.append(Problem(keys, f"suite_sampling: {greedy_once(sampling.num_generations or 1)}"))
        for name in self.suites:
            if not is_file(name) and name not in suite_names():
                problems.append(Problem(("suites",), f"suites: {unknown_suite(name)}"))
        if twice := sorted({name for name in self.suites if self.suites.count(name) > 1}):
            problems.append(Problem(("suites",), f"suites: {twice[0]} is there twice"))
        if self.suites_every and not self.suites:
            problems.append(Problem(("suites_every", "suites"), "suites_every: there are no suites to evaluate"))
        refuse(problems)
        return self


def greedy_once(completions: int) -> str:
    return (
        f"temperature 0 is greedy: its {completions} completions would all be the same; set num_generations to 1 or "
        "the temperature above 0"
    )
