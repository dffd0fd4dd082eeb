"""What is asked of a backend for each step, on-policy and ahead, and what of it a checkpoint holds."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.backends.base import OnGroup, Request, Sampling
from grpo.randomness import Stream, key
from grpo.rollout import rollouts as rollouts_module
from grpo.rollout.rollouts import Rollouts, share_of
from grpo.types import Completion, Episode, Group, Prompt, Status, ToolCall, Turn, VersionSpan
from tests.conftest import make_recipe

G = 2


class FakeTask:
    """Four prompts a step, each with an id of its own."""

    train = None

    def train_prompts(self, step: int) -> list[Prompt]:
        return [self.prompt(None, 4 * step + i) for i in range(4)]

    def prompt(self, part: Any, row: int) -> Prompt:
        return Prompt(row, f"q{row}", f"q{row}", [row])


class FakeBackend:
    """Writes down what it is asked: verb, prompts and version.

    A completion says which key and version it was asked for. The version held when it ends has made its last token."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int], int]] = []
        self.samplings: list[Sampling] = []
        self.version = 0

    def generate(
        self, requests: list[Request], sampling: Sampling, version: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        self._note("generate", requests, sampling, version)
        made = completions(requests, version, version)
        if on_group is not None and len(made) > 1:
            on_group(1, made[1])  # that group ended first; the others are not reported
        return made

    def submit(self, requests: list[Request], sampling: Sampling, version: int) -> Any:
        self._note("submit", requests, sampling, version)
        return requests, version

    def collect(self, flight: Any, on_group: OnGroup | None = None) -> list[list[Completion]]:
        requests, version = flight
        self.asked.append(("collect", [r.prompt.id for r in requests], version))
        made = completions(requests, version, self.version)
        if on_group is not None and len(made) > 1:
            on_group(1, made[1])
        return made

    def _note(self, verb: str, requests: list[Request], sampling: Sampling, version: int) -> None:
        assert version == self.version
        self.samplings.append(sampling)
        self.asked.append((verb, [request.prompt.id for request in requests], version))


def completions(requests: list[Request], asked: int, ended: int) -> list[list[Completion]]:
    return [
        [
            Completion(
                token_ids=[k % 1000, asked],
                sampler_logprobs=[-0.5, -0.25],
                status=list(Status)[k % 2],
                text=str(k),
                versions=[VersionSpan(0, 1, asked), VersionSpan(1, 2, ended)],
            )
            for k in request.keys
        ]
        for request in requests
    ]


class Steps:
    """A run's rollouts without the run: steps are taken one after the other, from prompts 0, 1, 2, ..."""

    def __init__(self, staleness: int, *, max_steps: int = 6, rank: int = 0, world: int = 1, dynamic: bool = False):
        rollout: dict[str, Any] = {"num_generations": G, "temperature": 0.7, "max_completion_length": 9}
        if staleness:
            rollout |= {"backend": "vllm", "max_staleness": staleness}
        training = {"output_dir": "unused", "prompts_per_step": 4, "max_steps": max_steps, "seed": 3}
        accelerator: Any = SimpleNamespace(process_index=rank, num_processes=world)
        prompts = {"dynamic_sampling": dynamic}
        recipe = make_recipe(Path("tiny"), rollout=rollout, training=training, prompts=prompts)
        task: Any = FakeTask()
        self.backend = FakeBackend()
        self.rollouts = Rollouts(recipe, task, self.backend, accelerator)
        self.step = self.drawn = 0  # steps made, prompts that they used

    def take(self, *wanted: int, on_group: Callable[[Group], None] = lambda _: None) -> list[Group]:
        """This process's groups of the next step, which draws so many prompts in each round (by default four)."""
        first = self.drawn + len(self.rollouts.ahead)
        prompts = (FakeTask().prompt(None, row) for row in itertools.count(first))
        self.backend.version = self.step
        found: list[Group] = []
        for number in wanted or (4,):
            groups = self.rollouts.take(self.step, prompts, number, on_group)
            found += [groups[place] for place in sorted(groups)]
            self.drawn += number
        self.step += 1
        return found


def ids(groups: list[Group]) -> list[int]:
    return [group.prompt.id for group in groups]


def texts(groups: list[Any]) -> list[str]:
    return [c.text for group in groups for c in group.completions]


# --- what is asked ---


@pytest.mark.parametrize("staleness", [0, 2])
def test_every_group_is_reported_once_and_those_that_ended_first_before_the_others(staleness: int) -> None:
    run = Steps(staleness)
    reported: list[Group] = []
    run.take()
    groups = run.take(on_group=reported.append)
    assert sorted(ids(reported)) == ids(groups) == [4, 5, 6, 7]
    assert reported[0] is groups[1]


def test_on_policy_a_step_samples_when_it_is_taken() -> None:
    run = Steps(0)
    for step in range(4):
        groups = run.take()
        assert ids(groups) == [4 * step + i for i in range(4)]
        assert [len(group.completions) for group in groups] == [G] * 4
    assert run.backend.asked == [("generate", [4 * k + i for i in range(4)], k) for k in range(4)]
    assert run.rollouts.state() is None


def test_what_later_steps_need_is_asked_for_before_a_step_waits_for_its_own() -> None:
    run = Steps(2, max_steps=5)
    asked = []
    for _ in range(5):
        run.take()
        asked.append([(verb, prompts[0] // 4, version) for verb, prompts, version in run.backend.asked])
        run.backend.asked.clear()
    assert asked == [
        [("submit", 0, 0), ("submit", 1, 0), ("submit", 2, 0), ("collect", 0, 0)],
        [("submit", 3, 1), ("collect", 1, 0)],
        [("submit", 4, 2), ("collect", 2, 0)],
        [("collect", 3, 1)],  # what comes behind the last step nobody needs
        [("collect", 4, 2)],
    ]
    assert run.rollouts.state() is None


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
@pytest.mark.parametrize("dynamic", [False, True])
def test_no_token_is_staler_than_allowed_however_many_prompts_steps_draw(staleness: int, dynamic: bool) -> None:
    run = Steps(staleness, max_steps=12, dynamic=dynamic)
    draw = random.Random(staleness)
    seen: list[int] = []
    keys: list[str] = []
    oldest = 0
    for step in range(12):
        rounds = [4, *(draw.randint(1, 4) for _ in range(draw.randint(0, 4)))] if dynamic else [4]
        groups = run.take(*rounds)
        assert len(groups) == sum(rounds), "what is asked for ahead is taken prompt by prompt"
        seen += ids(groups)
        keys += texts(groups)
        versions = [span.version for group in groups for c in group.completions for span in c.versions]
        assert max(versions) <= step
        oldest = max(oldest, step - min(versions))
        assert len(run.rollouts.ahead) == 4 * min(staleness, 11 - step)
    assert seen == list(range(len(seen))), "in the order of prompts, none left out"
    assert len(set(keys)) == len(keys), "no key twice"
    assert oldest <= staleness
    assert dynamic or oldest == staleness, "the bound is used"


def test_a_step_takes_whole_flights() -> None:
    """On two processes a flight is of two prompts; a step that wants three takes four, and counts all of them."""
    run = Steps(2, dynamic=True, world=2)
    run.take()
    prompts = (FakeTask().prompt(None, row) for row in itertools.count(12))
    run.backend.version = 1
    assert sorted(run.rollouts.take(1, prompts, 3, lambda _: None)) == [0, 2], "this process's of four"


def test_the_sampling_is_the_recipes_whether_ahead_or_not() -> None:
    for staleness in (0, 1):
        run = Steps(staleness)
        run.take()
        run.take()
        assert set(map(repr, run.backend.samplings)) == {repr(Sampling(9, temperature=0.7))}


# --- what a checkpoint holds ---


def loaded(state: Any) -> Any:
    """A trip through a file, as a checkpoint's states take it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain(groups: list[Group]) -> list[Any]:
    """Everything about completions, as lists."""
    return [
        (g.prompt.id, list(c.token_ids), list(c.sampler_logprobs), c.status, c.text, c.versions)
        for g in groups
        for c in g.completions
    ]


def resumed(state: Any, run: Steps, **keys: Any) -> Steps:
    again = Steps(run.rollouts.recipe.rollout.max_staleness, **keys)
    again.step, again.drawn, again.backend.version = run.step, run.drawn, run.step
    again.rollouts.restore(loaded(state), run.step)
    return again


def test_a_resumed_run_takes_what_was_ahead_and_goes_on_as_the_one_that_was_not_interrupted() -> None:
    run = Steps(2)
    run.take()
    state = run.rollouts.state()
    assert [verb for verb, *_ in run.backend.asked] == ["submit"] * 3 + ["collect"] * 3
    again = resumed(state, run)
    expected, found = run.take(), again.take()
    assert plain(found) == plain(expected), "to the token, its logprob, status and versions"
    assert {c.status for group in found for c in group.completions} == set(list(Status)[:2])
    assert again.backend.asked == [("submit", [12, 13, 14, 15], 1)], "nothing is sampled again"
    for _ in range(4):
        assert plain(again.take()) == plain(run.take())


def test_saving_twice_collects_once() -> None:
    run = Steps(1)
    run.take()
    first, second = run.rollouts.state(), run.rollouts.state()
    assert [verb for verb, *_ in run.backend.asked].count("collect") == 2  # the step's own, and what was ahead
    assert first is not None
    assert second is not None
    assert first[0]["completions"]["texts"] == second[0]["completions"]["texts"]


def test_episodes_and_prompts_that_reset_made_come_back() -> None:
    run = Steps(1)
    run.take()
    run.rollouts.state()
    for group in run.rollouts.queue[0].groups or []:
        group.prompt = replace(group.prompt, text="as it was used", token_ids=[group.prompt.id, 7])
        for completion in group.completions:
            completion.episode = Episode([Turn(1, 2, "stop", 0.5, (ToolCall("add", "{}", "3"),))], 1.0)
    again = resumed(run.rollouts.state(), run)
    expected, found = run.take(), again.take()
    assert [c.episode for g in found for c in g.completions] == [c.episode for g in expected for c in g.completions]
    assert [group.prompt for group in found] == [group.prompt for group in expected]
    assert found[0].prompt.token_ids == [4, 7]


def test_a_run_that_is_asked_to_stop_waits_for_nothing_and_asks_again_when_it_resumes() -> None:
    run = Steps(2)
    run.take()
    run.rollouts.state()  # a checkpoint before: two flights have landed
    run.take()
    run.backend.asked.clear()
    state = run.rollouts.state(wait=False)
    assert run.backend.asked == []
    again = resumed(state, run)
    assert again.backend.asked == [("submit", [12, 13, 14, 15], 2)], "what had not ended, of the policy there is now"
    for _ in range(4):
        assert texts(again.take()) == texts(run.take()), "by the same keys"


def test_without_anything_ahead_a_resumed_run_samples() -> None:
    run = Steps(1)
    run.rollouts.restore(None, 0)
    run.take()
    assert [verb for verb, *_ in run.backend.asked] == ["submit", "submit", "collect"]


def test_what_older_checkpoints_hold_is_read() -> None:
    """One step's completions, as a list of plain values."""
    requests = [Request(prompt, [10 * prompt.id, 10 * prompt.id + 1]) for prompt in FakeTask().train_prompts(3)]
    made = [completion for group in completions(requests, 2, 3) for completion in group]
    run = Steps(1)
    run.step, run.drawn = 3, 12
    run.rollouts.restore(loaded([{**asdict(c), "status": c.status.value} for c in made]), 3)
    groups = run.take()
    assert ids(groups) == [12, 13, 14, 15]
    assert plain(groups) == plain([Group(r.prompt, made[i * G : i * G + G]) for i, r in enumerate(requests)])
    assert run.backend.asked == [("submit", [16, 17, 18, 19], 3)]


def test_every_process_gets_its_own_share_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Steps(1, rank=rank, world=2) for rank in range(2)]
    mine: dict[int, Group] = {}

    def gather(groups: dict[int, Group]) -> list[Group]:
        mine.update(groups)
        return [mine[place] for place in sorted(mine)]

    monkeypatch.setattr(rollouts_module, "gather_groups", gather)
    states = []
    for run in ranks:
        run.take()
        states.append(run.rollouts.state())
    for rank, run in enumerate(ranks):
        again = resumed(states[-1], run, rank=rank, world=2)
        found = again.take()
        assert ids(found) == [4 + 2 * rank, 5 + 2 * rank]
        assert plain(found) == plain(run.take())


# --- keys and shares ---


def test_every_completion_has_a_key_of_seed_step_prompt_and_sample() -> None:
    run = Steps(0)
    run.take()
    for group in run.take():
        assert texts([group]) == [str(key(3, Stream.ROLLOUT.value, 1, group.prompt.id, g)) for g in range(G)]


def test_a_prompt_that_comes_twice_in_a_step_gets_fresh_samples() -> None:
    run = Steps(0)
    twice = iter([FakeTask().prompt(None, row) for row in (7, 8, 7, 7)])
    groups = run.rollouts.take(0, twice, 3, lambda _: None) | {3: run.rollouts.take(0, twice, 1, lambda _: None)[0]}
    expected = [key(3, Stream.ROLLOUT.value, 0, 7, g) for g in range(3 * G)]
    assert texts([groups[place] for place in (0, 2, 3)]) == list(map(str, expected))


def test_shares_are_pieces_that_gathering_puts_together() -> None:
    for number in (0, 5, 6):
        for world in (1, 2, 3, 6):
            shares = [share_of(number, SimpleNamespace(process_index=r, num_processes=world)) for r in range(world)]  # type: ignore[arg-type]
            assert list(itertools.chain(*shares)) == list(range(number))
