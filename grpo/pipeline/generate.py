"""n completions a prompt, sampled from a model with a recipe's task and scored by its rewards, outside of training.

The one way to do so. A killed process goes on where it was, and the file ends with the same bytes: a completion's key
is a function of seed, prompt and sample, and prompts are sampled in chunks, whose batches have the same shapes whenever
they are made. (So it is with ``backend: hf`` on the same machine. An engine of its own batches as it can, and then a
near-tie may fall the other way.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

from accelerate import Accelerator

from grpo.backends import check_engine, find_backend, make_backend, resolve_backend
from grpo.backends.base import Backend, Request, Sampling
from grpo.config import Recipe
from grpo.environments.episodes import Episodes, play
from grpo.environments.prepared import Prepared, prepared
from grpo.errors import UserError
from grpo.model.policy import Policy
from grpo.pipeline.sampled import SampleFile, header_of, of_sampling, read_header
from grpo.prompts.parts import Part
from grpo.prompts.task import Task
from grpo.randomness import Stream, key
from grpo.rollout.rollouts import share_of
from grpo.run.agreement import check_drawn
from grpo.run.exchange import gather_groups
from grpo.run.inputs import hash_inputs
from grpo.run.session import leave, make_accelerator, on_main, resolve_dtype
from grpo.run.state import identity_on
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Prompt

log = logging.getLogger("grpo")

AT_ONCE = 1024  # completions of a chunk, per process


@dataclass(frozen=True)
class Wanted:
    """What is asked for: ``n`` completions of each of so many prompts.

    ``prompts`` None is all rows of the part; a number takes the first ones of the recipe's order of data (which is a
    permutation by the seed, unless ``data.shuffle`` is false). ``chunk`` is how many prompts are sampled at once; None
    is what the file that goes on has, or as many as make ``AT_ONCE`` completions a process.
    """

    n: int
    prompts: int | None = None
    part: Literal["train", "held_out"] = "train"
    chunk: int | None = None

    def part_of(self, task: Task) -> Part:
        return task.train if self.part == "train" else task.held_out

    def rows(self, task: Task) -> list[int]:
        """The rows, in ascending order. Raises UserError where there are fewer than asked for."""
        part = self.part_of(task)
        if not part.ids:
            raise UserError("data.eval_size is 0: there are no held-out rows to sample for")
        if self.prompts is None:
            return sorted(part.ids)
        if self.prompts > len(part.ids):
            raise UserError(f"{self.prompts} prompts are more than the {len(part.ids)} rows that there are")
        return sorted(task.first_rows(self.prompts) if self.part == "train" else part.ids[: self.prompts])

    def of_file(self, file: Path, processes: int) -> Wanted:
        """With the size of chunks that ``file`` was begun with, or the usual one."""
        chunk = self.chunk
        if chunk is None and header_of(file).exists():
            chunk = read_header(file)["wanted"]["chunk"]
        return replace(self, chunk=chunk or max(AT_ONCE * processes // self.n, processes))


class Generated(NamedTuple):
    """The samples' header (``sampled.model_hash`` and ``recipe_hash`` read it), the task, and the recipe with what
    ``auto`` stood for."""

    header: dict[str, Any]
    task: Task
    recipe: Recipe


def generate(
    recipe: Recipe, wanted: Wanted, file: Path, choose: Callable[[Task, list[int]], list[int]] = lambda task, rows: rows
) -> Generated:
    """Sample and score what is wanted into ``file``, or go on with it; ``sampled.read_samples`` reads it.

    ``choose`` says for which of the wanted rows of the task, in ascending order. Returns what it was sampled from.
    Every process of a launch calls it, each does its share of a chunk, the first one writes.

    Raises:
        UserError: the recipe is wrong, or ``file`` holds samples of another one.
        RunError: rewards fail too often, or the disk refuses. Whole chunks stay, and the same call goes on.
    """
    if not recipe.functions():
        raise UserError("rewards: there are none, and nothing else judges what is sampled")
    find_backend(recipe)
    recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"max_staleness": 0})})
    accelerator = make_accelerator(recipe)
    recipe = resolve_backend(resolve_dtype(recipe, accelerator), accelerator)
    check_engine(recipe.rollout)
    policy = None
    with prepared(recipe) as of_recipe, SampleFile(file) as samples:
        task = of_recipe.task
        rows = choose(task, wanted.rows(task))
        wanted = on_main(accelerator, lambda: wanted.of_file(file, accelerator.num_processes))
        chunk, header = wanted.chunk or 1, on_main(accelerator, lambda: _header(recipe, accelerator, task, wanted))
        done = on_main(accelerator, lambda: samples.begin(header, rows, chunk))
        if done:
            log.info("%s: %d of %d prompts are there already", file, done, len(rows))
        if done < len(rows):
            policy = _sample_all(recipe, accelerator, of_recipe, wanted, rows, samples, done)
    leave(accelerator, policy)
    return Generated(header, task, recipe)


def _sample_all(
    recipe: Recipe,
    accelerator: Accelerator,
    of_recipe: Prepared,
    wanted: Wanted,
    rows: Sequence[int],
    samples: SampleFile,
    done: int,
) -> Policy:
    """Sample chunk by chunk from the ``done``-th prompt on. Returns what was sampled from."""
    tokenizer, stop_ids, task, episodes = of_recipe
    part, chunk = wanted.part_of(task), wanted.chunk or 1
    with Scorer(recipe.functions(), recipe.scoring, max_steps=1) as scorer:
        scorer.check_columns(task.columns)
        policy = Policy(recipe, accelerator, tokenizer, stop_ids, needs_reference=False)
        with closing(make_backend(recipe, policy)) as backend:
            backend.sync(policy, 0)
            for start in range(done, len(rows), chunk):
                began = perf_counter()
                prompts = [task.prompt(part, row) for row in rows[start : start + chunk]]
                groups = _sample(recipe, wanted, prompts, backend, scorer, accelerator, episodes)
                on_main(accelerator, partial(samples.append, groups))
                _tell(recipe, groups, start + len(groups), len(rows), perf_counter() - began)
    return policy


def _header(recipe: Recipe, accelerator: Accelerator, task: Task, wanted: Wanted) -> dict[str, Any]:
    identity = of_sampling(recipe, identity_on(recipe, accelerator, hash_inputs(recipe, task)))
    return {"wanted": asdict(wanted), **identity}


def _sample(
    recipe: Recipe,
    wanted: Wanted,
    prompts: Sequence[Prompt],
    backend: Backend,
    scorer: Scorer,
    accelerator: Accelerator,
    episodes: Episodes | None,
) -> list[Group]:
    """A chunk's groups, scored while others are sampled; the same on every process."""
    check_drawn(((p.id, p.token_ids, p.columns) for p in prompts), "prompts to sample for")
    seed, share = recipe.training.seed, share_of(len(prompts), accelerator)
    requests = [
        Request(p, [key(seed, Stream.SAMPLE.value, wanted.part, p.id, g) for g in range(wanted.n)])
        for p in (prompts[i] for i in share)
    ]
    scoring = scorer.start(0)
    sampling = Sampling.from_recipe(recipe.rollout)
    mine = play(episodes, backend, requests, sampling, 0, lambda _, group: scoring.add(group))
    scoring.finish()
    return gather_groups({share.start + place: group for place, group in enumerate(mine)})


def _tell(recipe: Recipe, groups: Sequence[Group], done: int, of: int, seconds: float) -> None:
    judged = [group.rewards_by_function[recipe.judged_by(group.prompt.source)] for group in groups]
    values = [value for of_group in judged for value in of_group]
    solved = sum(value is not None and value >= 1 for value in values) / max(len(values), 1)
    log.info(
        "%d of %d prompts sampled; of the last %d completions %.0f%% are right (%.1f s)",
        *(done, of, len(values), 100 * solved, seconds),
    )
