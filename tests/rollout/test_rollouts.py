"""What is asked of a backend for each step, with and without overlap, and what of it a checkpoint holds."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.backends.base import OnGroup, Request, Sampling
from grpo.randomness import Stream, key
from grpo.rollout import rollouts as rollouts_module
from grpo.rollout.rollouts import Rollouts, rollout_requests, share_of
from grpo.types import Completion, Group, Prompt, Status, VersionSpan
from tests.conftest import make_recipe

G = 2


class FakeTask:
    """Four prompts a step, each with an id of its own."""

    def train_prompts(self, step: int) -> list[Prompt]:
        return [Prompt(10 * step + i, f"{step}.{i}", f"{step}.{i}", [step, i]) for i in range(4)]


class FakeBackend:
    """Writes down what it is asked; a completion says which key and version it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.samplings: list[Sampling] = []

    def generate(
        self, requests: list[Request], sampling: Sampling, version: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        self._note("generate", requests, sampling, version)
        made = completions(requests, version)
        if on_group is not None and len(made) > 1:
            on_group(1, made[1])  # that group ended first; the others are not reported
        return made

    def submit(self, requests: list[Request], sampling: Sampling, version: int) -> Any:
        self._note("submit", requests, sampling, version)
        return requests, version

    def collect(self, flight: Any) -> list[list[Completion]]:
        self.asked.append(("collect", steps(flight[0])))
        return completions(*flight)

    def _note(self, verb: str, requests: list[Request], sampling: Sampling, version: int) -> None:
        self.samplings.append(sampling)
        self.asked.append((verb, (steps(requests), version)))


def steps(requests: list[Request]) -> int:
    """The step that requests are for."""
    (step,) = {request.prompt.id // 10 for request in requests}
    return step


def completions(requests: list[Request], version: int) -> list[list[Completion]]:
    return [
        [
            Completion(
                token_ids=[k % 1000, version],
                sampler_logprobs=[-0.5, -0.25],
                status=list(Status)[k % 2],
                text=str(k),
                versions=[VersionSpan(0, 1, version), VersionSpan(1, 2, version + 1)],
            )
            for k in request.keys
        ]
        for request in requests
    ]


def make(*, overlap: bool, max_steps: int = 4, rank: int = 0, world: int = 1) -> tuple[Rollouts, FakeBackend]:
    rollout: dict[str, Any] = {"num_generations": G, "temperature": 0.7, "max_completion_length": 9}
    if overlap:
        rollout |= {"backend": "vllm", "overlap": True}
    training = {"output_dir": "unused", "prompts_per_step": 4, "max_steps": max_steps, "seed": 3}
    backend = FakeBackend()
    accelerator: Any = SimpleNamespace(process_index=rank, num_processes=world)
    recipe = make_recipe(Path("tiny"), rollout=rollout, training=training)
    task: Any = FakeTask()
    return Rollouts(recipe.rollout, recipe.training, task, backend, accelerator), backend


def ignore(group: Group) -> None: ...


def take(rollouts: Rollouts, step: int, on_group: Callable[[Group], None] = ignore) -> list[Group]:
    """A step's groups, of the prompts that are next in the data."""
    return rollouts.take(step, FakeTask().train_prompts(step), on_group)


def texts(groups: list[Any]) -> list[str]:
    return [c.text for group in groups for c in group.completions]


# --- what is asked ---


@pytest.mark.parametrize("overlap", [False, True])
def test_every_group_is_reported_once_and_those_that_ended_first_before_the_others(overlap: bool) -> None:
    rollouts, _ = make(overlap=overlap)
    reported: list[Group] = []
    take(rollouts, 0)
    groups = take(rollouts, 1, reported.append)
    assert sorted(group.prompt.id for group in reported) == [group.prompt.id for group in groups] == [10, 11, 12, 13]
    assert reported[0] is groups[0 if overlap else 1]


def test_without_overlap_a_step_samples_when_it_is_taken() -> None:
    rollouts, backend = make(overlap=False)
    for step in range(4):
        groups = take(rollouts, step)
        assert backend.asked[-1] == ("generate", (step, step))
        assert [group.prompt.id for group in groups] == [10 * step + i for i in range(4)]
        assert [len(group.completions) for group in groups] == [G] * 4
    assert len(backend.asked) == 4
    assert rollouts.state() is None


def test_with_overlap_the_next_step_is_asked_of_the_policy_before() -> None:
    rollouts, backend = make(overlap=True)
    asked = []
    for step in range(4):
        take(rollouts, step)
        asked.append(backend.asked[:])
        backend.asked.clear()
    assert asked == [
        [("generate", (0, 0)), ("submit", (1, 0))],
        [("collect", 1), ("submit", (2, 1))],
        [("collect", 2), ("submit", (3, 2))],
        [("collect", 3)],  # the last step: what comes behind it nobody needs
    ]


@pytest.mark.parametrize("max_steps", [1, 2])
def test_nothing_is_asked_beyond_the_last_step(max_steps: int) -> None:
    rollouts, backend = make(overlap=True, max_steps=max_steps)
    for step in range(max_steps):
        take(rollouts, step)
    assert [what for verb, what in backend.asked if verb == "submit"] == [
        (step + 1, step) for step in range(max_steps - 1)
    ]
    assert rollouts.state() is None


def test_a_step_gets_the_same_requests_with_and_without_overlap() -> None:
    plain, ahead = make(overlap=False)[0], make(overlap=True)[0]
    for step in range(4):
        assert texts(take(plain, step)) == texts(take(ahead, step))


def test_the_sampling_is_the_recipes_whether_ahead_or_not() -> None:
    rollouts, backend = make(overlap=True)
    for step in range(3):
        take(rollouts, step)
    assert set(map(repr, backend.samplings)) == {repr(Sampling(9, temperature=0.7))}


# --- what a checkpoint holds ---


def loaded(state: Any) -> Any:
    """A trip through a file, as a checkpoint's states take it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_run_takes_what_was_ahead() -> None:
    first, before = make(overlap=True)
    take(first, 0)
    state = first.state()
    assert before.asked[-1] == ("collect", 1)
    again, after = make(overlap=True)
    again.restore(loaded(state))
    expected, found = take(first, 1), take(again, 1)
    assert found == expected, "to the token, its logprob, status and versions"
    assert {c.status for group in found for c in group.completions} == set(list(Status)[:2])
    assert after.asked == [("submit", (2, 1))], "nothing is sampled again"
    assert before.asked[-2:] == [("collect", 1), ("submit", (2, 1))], "and the first run collected once"
    assert texts(take(again, 2)) == texts(take(first, 2))


def test_saving_twice_collects_once() -> None:
    rollouts, backend = make(overlap=True)
    take(rollouts, 0)
    assert rollouts.state() == rollouts.state()
    assert backend.asked.count(("collect", 1)) == 1


def test_without_anything_ahead_a_resumed_run_samples() -> None:
    rollouts, backend = make(overlap=True)
    rollouts.restore(None)
    take(rollouts, 2)
    assert backend.asked == [("generate", (2, 2)), ("submit", (3, 2))]


def test_every_process_gets_its_own_share_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [make(overlap=True, rank=rank, world=2)[0] for rank in range(2)]
    mine: list[list[Any]] = []
    monkeypatch.setattr(rollouts_module, "gather_object", lambda rows: mine.append(rows) or rows)
    for rollouts in ranks:
        take(rollouts, 0)
        rollouts.state()
    gathered = list(itertools.chain(*mine))
    assert len(gathered) == 4 * G
    for rank, rollouts in enumerate(ranks):
        again, _ = make(overlap=True, rank=rank, world=2)
        again.restore(gathered)
        found = take(again, 1)
        assert [group.prompt.id for group in found] == [10 + 2 * rank, 11 + 2 * rank]
        assert found == take(rollouts, 1)


# --- keys and shares ---


def test_every_completion_has_a_key_of_seed_step_prompt_and_sample() -> None:
    requests = rollout_requests(FakeTask().train_prompts(5), 5, num_generations=G, seed=3)
    for request in requests:
        assert request.keys == [key(3, Stream.ROLLOUT.value, 5, request.prompt.id, g) for g in range(G)]
    assert len({k for request in requests for k in request.keys}) == 4 * G


def test_a_prompt_that_comes_twice_gets_fresh_samples() -> None:
    prompt = Prompt(7, "q", "q", [1])
    first, other, second = rollout_requests([prompt, Prompt(8, "r", "r", [2]), prompt], 0, num_generations=G, seed=0)
    assert len({*first.keys, *other.keys, *second.keys}) == 3 * G
    assert second.keys == [key(0, Stream.ROLLOUT.value, 0, 7, g) for g in (G, G + 1)]


def test_shares_are_pieces_that_gathering_puts_together() -> None:
    requests = [Request(Prompt(i, "", "", []), []) for i in range(6)]
    for world in (1, 2, 3, 6):
        shares = [share_of(requests, SimpleNamespace(process_index=r, num_processes=world)) for r in range(world)]  # type: ignore[arg-type]
        assert list(itertools.chain(*shares)) == requests
