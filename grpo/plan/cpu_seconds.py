"""Seconds of a step on this machine's CPU: the real engine and the real update, timed for a few seconds each; and the
memory that the recipe's rows take.

Lengths are made up, so that completions end where the plan assumes it and not where the model would. The model's
weights do not change what a step costs.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.config import Recipe
from grpo.errors import UserError, first_line
from grpo.model.loading import load_tokenizer
from grpo.model.policy import Policy
from grpo.model.teacher import load_teacher
from grpo.plan.work import Lengths
from grpo.randomness import key
from grpo.run.run import Run
from grpo.run.session import make_accelerator, prepare_task
from grpo.types import Completion, Episode, Example, Group, Prompt, Status, TeacherSays, Turn, VersionSpan
from grpo.update.step import update
from grpo.update.supervised import supervised_step

log = logging.getLogger("grpo")

SECONDS = 5.0  # of a measurement, at least, where the work lasts so long
REPEATS = 6  # of a shorter one
FEW = 8  # tokens of the first, shortest rollout
TOP_K = 32  # likeliest tokens of a teacher in rows, as `grpo teach` writes


@dataclass(frozen=True)
class Line:
    """Seconds of ``n`` pieces of work: ``fixed + n * each``."""

    fixed: float
    each: float

    @classmethod
    def through(cls, few: tuple[float, float], many: tuple[float, float]) -> Line:
        """Of two measurements (pieces, seconds); of one, where both are the same."""
        (n, seconds), (more, more_seconds) = few, many
        if more <= n:
            return cls(0.0, more_seconds / more)
        each = max(more_seconds - seconds, 0.0) / (more - n)
        return cls(max(more_seconds - each * more, 0.0), each)

    def at(self, n: float) -> float:
        return self.fixed + self.each * n


@dataclass(frozen=True)
class Measured:
    """``decoding``: of one step over so many sequences. ``updating``: of an update of so many groups. ``rows``: their
    bytes."""

    decoding: Line
    updating: Line
    prefill: float  # of one prompt
    rows: float

    def rollout(self, completions: int, prompts: int, lengths: Lengths, at_once: int) -> float:
        """Sequences end one after the other: as many steps as the longest has, and every token once."""
        longest = min(lengths.longest, 2 * lengths.completion)
        waves = max(1.0, completions / at_once)
        tokens = completions * lengths.completion
        read = self.prefill * (prompts + completions * lengths.environment / max(lengths.prompt, 1.0))
        return read + self.decoding.fixed * longest * waves + self.decoding.each * tokens


def measure(recipe: Recipe, lengths: Lengths) -> Measured:
    """Load the recipe's model and time it. Raises UserError where the model is not on this machine."""
    accelerator = make_accelerator(recipe)
    tokenizer = load_tokenizer(recipe.model)
    rows = _rows(recipe)
    needs_reference = recipe.stage == "grpo" and recipe.algorithm.beta > 0
    policy = Policy(recipe, accelerator, tokenizer, [], needs_reference)  # no token ends a completion
    load_teacher(recipe, policy)
    updating = _updating(recipe, lengths, policy)
    if recipe.stage != "grpo":
        return Measured(Line(0.0, 0.0), updating, 0.0, rows)
    most = recipe.rollout.max_batch_size
    with closing(HFBackend(policy, max_batch_size=most, kv_cache_gb=recipe.rollout.kv_cache_gb)) as backend:
        backend.sync(policy, 0)
        decoding, prefill = _decoding(recipe, lengths, backend)
    return Measured(decoding, updating, prefill, rows)


def _rows(recipe: Recipe) -> float:
    """Bytes of this process's memory that the rows and the checks of them take; 0 where they are not on this machine,
    or a hub's."""
    if recipe.data.hub is not None:
        return 0.0
    process = psutil.Process()
    before = process.memory_info().rss
    try:
        loaded = prepare_task(recipe)
    except UserError as error:
        log.warning("the memory of the rows is not in the plan: %s", first_line(error))
        return 0.0
    after = process.memory_info().rss
    del loaded
    return float(max(after - before, 0))


def _decoding(recipe: Recipe, lengths: Lengths, backend: HFBackend) -> tuple[Line, float]:
    """Seconds of a decoding step by sequences, and of a prompt's prefill."""
    P, G = recipe.training.prompts_per_step, recipe.rollout.num_generations
    P = min(P, max(recipe.rollout.max_batch_size // G, 1))
    tokens = max(round(lengths.completion), FEW + 1)

    def seconds(prompts: int, tokens: int) -> float:
        requests = [Request(_prompt(p, lengths), [key(0, p, g) for g in range(G)]) for p in range(prompts)]
        return _timed(lambda: backend.generate(requests, Sampling(tokens), 0))

    seconds(P, 2)  # compiles, allocates
    start, few = seconds(P, 1), seconds(P, FEW)
    step = max(few - start, 1e-6) / (FEW - 1)
    tokens = min(tokens, max(round(SECONDS / step), 2 * FEW))
    step = (seconds(P, tokens) - start) / (tokens - 1)
    fewer = max(P // 4, 1)
    step_of_fewer = (seconds(fewer, tokens) - start * fewer / P) / (tokens - 1)
    line = Line.through((fewer * G, max(step_of_fewer, 1e-9)), (P * G, max(step, 1e-9)))
    return line, start / P


def _updating(recipe: Recipe, lengths: Lengths, policy: Policy) -> Line:
    """Seconds of a step's updates by groups: twice as many each time, until they last long enough. The largest are
    timed again where they are short: the first time of a size allocates."""
    least = recipe.algorithm.num_minibatches
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, policy, Path(folder))

        def timed(groups: int) -> tuple[int, float]:
            if recipe.stage != "grpo":
                examples = [_example(number, recipe, lengths) for number in range(groups)]
                return groups, _timed(lambda: supervised_step(run, examples, 1e-9))
            made = [_group(number, recipe, lengths) for number in range(groups)]
            rows = np.linspace(-1, 1, len(made[0].completions))
            return groups, _timed(lambda: update(run, made, np.tile(rows, (groups, 1)), 1e-9))

        def again(size: tuple[int, float]) -> tuple[int, float]:
            times = [size[1]]
            while len(times) < REPEATS and sum(times) < SECONDS:
                times.append(timed(size[0])[1])
            return size[0], median(times[1:] or times)

        timed(least)  # compiles, allocates
        few = many = timed(least)
        while many[0] < recipe.training.prompts_per_step and many[1] < SECONDS:
            few, many = many, timed(min(2 * many[0], recipe.training.prompts_per_step))
        return Line.through(again(few), again(many))


def _ids(number: int, tokens: float) -> list[int]:
    return [1 + (7 * number + i) % 50 for i in range(max(round(tokens), 1))]


def _prompt(number: int, lengths: Lengths) -> Prompt:
    return Prompt(number, "", "", _ids(number, lengths.prompt))


def _group(number: int, recipe: Recipe, lengths: Lengths) -> Group:
    completions, says = [], []
    for sample in range(recipe.rollout.num_generations):
        ids, answers = _ids(number + sample, lengths.completion + lengths.environment), round(lengths.environment)
        says.append(_says(recipe, len(ids)))
        versions = [VersionSpan(0, len(ids), 0)]
        episode = Episode([Turn(answers, len(ids), "stop")]) if answers else None
        completions.append(Completion(ids, [-1.0] * len(ids), Status.STOP, "", versions, episode))
    teacher = says if _has_teacher_elsewhere(recipe) else None
    return Group(_prompt(number, lengths), completions, rewards=[0.0] * len(completions), teacher=teacher)


def _example(number: int, recipe: Recipe, lengths: Lengths) -> Example:
    ids = _ids(number, lengths.completion)
    says = _says(recipe, len(ids)) if _has_teacher_elsewhere(recipe) else None
    return Example(_prompt(number, lengths).token_ids, ids, says)


def _has_teacher_elsewhere(recipe: Recipe) -> bool:
    return recipe.teacher is not None and recipe.teacher.name is None


def _says(recipe: Recipe, tokens: int) -> TeacherSays:
    """What a teacher elsewhere might say: of the tokens alone, or of as many others at each."""
    top_k = 0 if recipe.teacher is None or recipe.teacher.sampled_alone else recipe.teacher.top_k or TOP_K
    if top_k == 0:
        return TeacherSays([-1.0] * tokens)
    return TeacherSays((), [list(range(1, top_k + 1))] * tokens, [[-9.0] * top_k] * tokens)


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
