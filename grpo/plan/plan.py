"""A plan: whether a recipe fits on a machine, and what it takes of disk, time and money."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from grpo.config import Recipe
from grpo.model.memory_budget import Budget, budget, weights_of
from grpo.model.shape import Shape
from grpo.plan import gpu_seconds
from grpo.plan.cards import Card
from grpo.plan.work import Lengths, work_of_step

KEPT = 2  # states of the best models: run.rollback.KEPT
USABLE = 0.95  # of a card: the allocator's pieces do not fit together without a gap
BudgetOf = Callable[[Recipe], Budget]


@dataclass(frozen=True)
class Seconds:
    """``rollout``, ``update`` and ``other`` of a step, and of one ``evaluation``."""

    rollout: float
    update: float
    other: float
    evaluation: float

    @property
    def step(self) -> float:
        return self.rollout + self.update + self.other


@dataclass
class Plan:
    """What ``grpo plan`` says. ``memory`` is of each GPU, or of the training process on a CPU; ``capacity`` is what is
    there. ``cures`` are changes of the recipe that make it fit, each a list of overrides. Bytes, seconds, US dollars.
    """

    machine: str
    gpus: int
    shape: Shape
    lengths: Lengths
    memory: Budget
    capacity: float
    disk: float
    seconds: Seconds | None
    steps: int
    evaluations: int
    price: float | None
    assumptions: list[str] = field(default_factory=list)
    cures: list[list[str]] = field(default_factory=list)

    @property
    def peak_bytes(self) -> float:
        return max(sum(self.memory.update.values()), sum(self.memory.rollout.values()))

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= USABLE * self.capacity

    @property
    def hours(self) -> float | None:
        if self.seconds is None:
            return None
        return (self.steps * self.seconds.step + self.evaluations * self.seconds.evaluation) / 3600

    @property
    def dollars(self) -> float | None:
        """``price`` is of one GPU for an hour (of the machine, on a CPU)."""
        return None if self.hours is None or self.price is None else self.hours * self.price * max(self.gpus, 1)

    def as_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "gpus": self.gpus,
            "parameters": self.shape.parameters,
            "active_parameters": self.shape.active_parameters,
            "peak_bytes": round(self.peak_bytes),
            "capacity_bytes": round(self.capacity),
            "fits": self.fits,
            "memory": {"update": self.memory.update, "rollout": self.memory.rollout, "host": self.memory.host},
            "disk_bytes": round(self.disk),
            "step_seconds": self.seconds.step if self.seconds else None,
            "seconds": vars(self.seconds) if self.seconds else None,
            "hours": self.hours,
            "dollars": self.dollars,
            "lengths": vars(self.lengths),
            "assumptions": self.assumptions,
            "cures": self.cures,
        }


def plan_for_gpus(
    recipe: Recipe,
    shape: Shape,
    card: Card,
    lengths: Lengths,
    *,
    gpus: int,
    fsdp2: bool,
    price: float | None,
    teacher: Shape | None = None,
) -> Plan:
    """From data sheets and counts; what is not known is an assumption."""
    shards = gpus if fsdp2 else 1
    work = work_of_step(recipe, shape, lengths, teacher)

    def budget_of(changed: Recipe) -> Budget:
        return budget(changed, shape, card.bytes, shards=shards, teacher=teacher)

    rollout = evaluation = 0.0
    if recipe.stage == "grpo":
        rollout = gpu_seconds.rollout_seconds(recipe, shape, lengths, work, card, gpus)
        evaluated = recipe.data.held_out() * recipe.evaluation.num_generations
        evaluation = rollout * max(evaluated / work.completions, 1.0)
    update = gpu_seconds.update_seconds(shape, work, card, gpus)
    other = gpu_seconds.OTHER * (rollout + update)
    return _plan(
        recipe,
        shape,
        lengths,
        budget_of,
        machine=card.title,
        gpus=gpus,
        capacity=card.bytes,
        seconds=Seconds(rollout, update, other, evaluation),
        price=price,
        assumptions=[
            *_of_lengths(recipe, lengths),
            *gpu_seconds.assumptions(recipe, shape, card),
            *_of_teacher(recipe),
        ],
    )


def plan_for_cpu(
    recipe: Recipe,
    shape: Shape,
    lengths: Lengths,
    *,
    capacity: float,
    compute: str,
    price: float | None,
    teacher: Shape | None = None,
) -> Plan:
    """``recipe`` timed on this machine. Raises UserError where its model is not on it."""
    from grpo.plan import cpu_seconds
    from grpo.plan.cpu_memory import cpu_budget

    measured = cpu_seconds.measure(recipe, lengths)
    P, G = recipe.training.prompts_per_step, recipe.rollout.num_generations
    rollout = evaluation = 0.0
    if recipe.stage == "grpo":
        rollout = measured.rollout(P * G, P, lengths, recipe.rollout.max_batch_size)
        held_out, samples = recipe.data.held_out(), recipe.evaluation.num_generations
        evaluation = measured.rollout(held_out * samples, held_out, lengths, recipe.rollout.max_batch_size)
    update = measured.updating.at(P * (lengths.with_signal if recipe.teacher is None else 1.0))
    assumptions = [
        *_of_lengths(recipe, lengths),
        "seconds: timed here just now, and true if nothing else ran",
        *_of_teacher(recipe),
    ]
    return _plan(
        recipe,
        shape,
        lengths,
        lambda changed: cpu_budget(changed, shape, lengths, compute=compute, rows=measured.rows, teacher=teacher),
        machine=f"this CPU, {compute}",
        gpus=0,
        capacity=capacity,
        seconds=Seconds(rollout, update, 0.0, evaluation),
        price=price,
        assumptions=assumptions,
    )


def _plan(recipe: Recipe, shape: Shape, lengths: Lengths, budget_of: BudgetOf, **known: Any) -> Plan:
    training = recipe.training
    price = known.pop("price")
    found = Plan(
        shape=shape,
        lengths=lengths,
        memory=budget_of(recipe),
        disk=disk_bytes(recipe, shape),
        steps=training.max_steps,
        evaluations=_evaluations(recipe),
        price=training.dollars_per_hour if price is None else price,
        **known,
    )
    if not found.fits:
        found.cures = list(itertools.islice(_cures(recipe, budget_of, USABLE * found.capacity), MOST_CURES))
    return found


def _of_lengths(recipe: Recipe, lengths: Lengths) -> list[str]:
    said = f"prompts of {lengths.prompt:.0f} tokens and completions of {lengths.completion:.0f} on average"
    if recipe.stage == "grpo":
        said += f", {lengths.with_signal:.0%} of groups with a signal"
    return [f"{said} (--prompt-length, --length, --signal)", *_of_environment(recipe, lengths)]


def _of_environment(recipe: Recipe, lengths: Lengths) -> list[str]:
    if recipe.environment is None:
        return []
    return [
        f"an environment that adds {lengths.environment:.0f} tokens to a completion on average (--environment-length); "
        "how long it takes to answer is not known, and not in the seconds"
    ]


def _of_teacher(recipe: Recipe) -> list[str]:
    if recipe.teacher is None or recipe.teacher.url is None:
        return []
    return ["the teacher's server is none of this: its time is not in the seconds, its GPU not in the dollars"]


def _evaluations(recipe: Recipe) -> int:
    training, first = recipe.training, int(recipe.evaluation.at_start)
    if not recipe.data.held_out():
        return 0
    if not training.eval_every:
        return first + 1
    return first + -(-training.max_steps // training.eval_every)


def disk_bytes(recipe: Recipe, shape: Shape) -> float:
    """Checkpoints (one more than are kept, while the newest is written) and ``final/``, ``best/`` where it is kept, and
    what a rollback needs. Rollouts and metrics are small beside them."""
    _, trained, each = weights_of(recipe, shape)
    state = 8.0 if recipe.optimizer.optim == "adamw_torch" else 2.0
    checkpoint = trained * (each + state + 2.0 * (recipe.model.weights == "bfloat16"))
    final = shape.parameters * (2.0 if recipe.model.dtype == "bfloat16" else 4.0)
    models = 1 + (recipe.training.save_best is not None)
    states = KEPT if recipe.health.rolls_back() else 0
    return (recipe.training.save_total_limit + 1 + states) * checkpoint + models * final


# --- what would make it fit -------------------------------------------------------------------------------------------

MOST_CURES = 3
MOST_CHANGES = 4
CHANGES: list[tuple[str, Any]] = [  # the cheaper ones in time and learning first
    ("training.micro_batch_tokens", 8192),
    ("rollout.kv_cache_gb", 2.0),
    ("rollout.vllm_gpu_memory_utilization", 0.5),
    ("model.gradient_checkpointing", True),
    ("optimizer.optim", "adamw_8bit"),
    ("optimizer.offload", True),
    ("algorithm.beta", 0.0),
    ("model.weights", "bfloat16"),
    ("model.lora", {"r": 16}),
]


def _cures(recipe: Recipe, budget_of: BudgetOf, most: float) -> Iterator[list[str]]:
    """The smallest sets of changes with which every peak is below ``most``: of one key if there are any, else of two,
    and so on."""
    for count in range(1, MOST_CHANGES + 1):
        found = False
        for changes in itertools.combinations(CHANGES, count):
            changed = _changed(recipe, changes)
            if changed is None:
                continue
            parts = budget_of(changed)
            if max(sum(parts.update.values()), sum(parts.rollout.values())) <= most:
                found = True
                yield [f"{key}={_written(value)}" for key, value in changes]
        if found:
            return


def _changed(recipe: Recipe, changes: tuple[tuple[str, Any], ...]) -> Recipe | None:
    """None where the changes do not go together, or change nothing."""
    content = recipe.model_dump(exclude_unset=True)
    for key, value in changes:
        section, name = key.split(".")
        before = getattr(getattr(recipe, section), name)
        if before == value or (isinstance(before, int | float) and not isinstance(value, bool) and before <= value):
            return None
        if section == "rollout" and name.startswith("vllm") and recipe.rollout.backend == "hf":
            return None
        content.setdefault(section, {})[name] = value
    try:
        return Recipe.model_validate(content)
    except ValidationError:
        return None


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}'"
    return str(value).lower() if isinstance(value, bool) else str(value)
