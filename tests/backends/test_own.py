"""A backend of the user's own: what is wrong with it is told in one line, and nothing wrong is trained on."""

from __future__ import annotations

import math
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from grpo.backends import find_backend, make_backend
from grpo.backends.base import Request, Sampling
from grpo.backends.own import CheckedBackend, wrong_groups
from grpo.config import RolloutConfig
from grpo.errors import RunError, UserError
from grpo.types import Completion, Prompt, Status, VersionSpan
from tests.answering import Answering
from tests.conftest import make_recipe

SAMPLING = Sampling(max_completion_length=4)
REQUESTS = [Request(Prompt(7, "p", "p", [1]), keys=[1, 2]), Request(Prompt(9, "q", "q", [2]), keys=[3])]

RIGHT = """
class Mine:
    def __init__(self, policy, rollout): self.given = policy, rollout.num_generations
    def generate(self, requests, sampling, version, on_group=None): ...
    def sync(self, policy, version): return {}
    def close(self): ...
"""


def completion(token_ids=(5, 6), logprobs=(-0.5, -0.1), status=Status.STOP, versions=None, version=3):
    spans = [VersionSpan(0, len(token_ids), version)] if versions is None else versions
    return Completion(list(token_ids), list(logprobs), status, "text", spans)


@pytest.fixture
def find(tmp_path):
    """Looks for a backend in a file of this text, as a run does before it loads a model."""

    def find(text, file="my_backend.py", environment=None, **rollout):
        (tmp_path / file).write_text(text)
        chosen = RolloutConfig(backend=f"{tmp_path}/{file}:Mine", **rollout)
        find_backend(SimpleNamespace(rollout=chosen, environment=environment))

    return find


def test_it_is_made_of_the_policy_and_the_rollout_section(tmp_path, find):
    find(RIGHT)
    recipe = make_recipe(tmp_path, rollout={"backend": f"{tmp_path}/my_backend.py:Mine", "num_generations": 4})
    policy = SimpleNamespace(stop_token_ids=[77])
    backend = make_backend(recipe, policy)
    assert backend.backend.given == (policy, 4)
    assert backend.sync(policy, 1) == {}
    backend.close()
    assert recipe.algorithm.importance_sampling_mode == "token_truncate"  # nobody knows how its sampler rounds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RIGHT.replace("def sync", "def synch"), "Mine has no sync; a backend has generate, sync, close"),
        (RIGHT.replace("sampling, version, on_group=None", "sampling"), r"Mine: generate takes \(self, requests, .*"),
        (RIGHT.replace("policy, rollout", "policy"), r"Mine takes \(policy\); it is called with \(policy, rollout\)"),
        ("Mine = 3", "Mine is an int: 3; expected a class with generate, sync, close"),
        ("class Mine(:\n", r".*/my_backend.py:1: SyntaxError: invalid syntax"),
    ],
)
def test_what_is_no_backend_is_refused_before_a_model_is_loaded(find, text, said):
    with pytest.raises(UserError, match=rf"^rollout.backend: (.*my_backend.py:)?{said}$"):
        find(text)


def test_sampling_ahead_needs_its_two_methods(find):
    with pytest.raises(
        UserError, match=r"Mine has no submit and no collect.*\(rollout.max_staleness needs submit and collect\)"
    ):
        find(RIGHT, max_staleness=1)
    more = "    def submit(self, requests, sampling, version): ...\n    def collect(self, flight): ...\n"
    find(RIGHT + more, file="overlapping.py", max_staleness=1)


def test_a_function_that_makes_one_is_looked_at_when_it_has(tmp_path, find):
    find("def Mine(policy, rollout): return object()")
    recipe = make_recipe(tmp_path, rollout={"backend": f"{tmp_path}/my_backend.py:Mine"})
    with pytest.raises(UserError, match=r"Mine has no generate and no sync and no close; a backend has"):
        make_backend(recipe, None)


STOPS = frozenset({77})
WRONG = {
    "it returned None; expected a list of completions for each of 2 requests": None,
    r"it returned 2 completions; expected one for each key of the 2 requests: 2 \+ 1": [[completion(), completion()]],
    "prompt 9, completion 0: it is a str: 'text'; expected a grpo.types.Completion": "text",
    "prompt 9, completion 0: its status is a str: 'stop'; expected .*": completion(status="stop"),
    "prompt 9, completion 0: it has 2 token_ids and 1 sampler_logprobs; .*": completion(logprobs=[-1.0]),
    "prompt 9, completion 0: it has no token, .*": completion([], []),
    r"prompt 9, completion 0: it has 5 tokens, more than max_completion_length \(4\)": completion([1] * 5, [-1.0] * 5),
    "prompt 9, completion 0: its token_ids are not all integers": completion([1.0], [-1.0]),
    r"prompt 9, completion 0: it goes on behind token 1, which is 77, an end-of-sequence token; .*": completion(
        [5, 77, 0, 0], [-1.0] * 4
    ),
    "prompt 9, completion 0: its sampler_logprobs are not all finite .*": completion([1], [-math.inf]),
    "prompt 9, completion 0: its sampler_logprobs are not all finite floats .*": completion([1], [0.5]),
    "prompt 9, completion 0: its versions do not cover its 2 tokens; .*": completion(versions=[VersionSpan(0, 1, 3)]),
}


class Returns:
    """Generates what it is told to."""

    def __init__(self, groups):
        self.groups = groups

    def generate(self, requests, sampling, version, on_group=None):
        if on_group is not None and self.groups:
            on_group(0, self.groups[0])
        return self.groups

    def sync(self, policy, version):
        return self.groups


@pytest.mark.parametrize("said", WRONG)
def test_wrong_completions_are_refused(said):
    last = WRONG[said]
    groups = last if last is None or isinstance(last, list) else [[completion(), completion()], [last]]
    backend = CheckedBackend(Returns(groups), "rollout.backend: mine", STOPS)
    with pytest.raises(UserError, match=rf"^rollout.backend: mine: generate: {said}$"):
        backend.generate(REQUESTS, SAMPLING, 3)


def test_right_completions_pass_and_a_lost_one_has_no_tokens():
    groups = [[completion(), completion([1], [0.0])], [completion([], [], Status.ERROR, versions=[])]]
    assert wrong_groups(groups, REQUESTS, SAMPLING, STOPS) is None
    told = []
    backend = CheckedBackend(Returns(groups), "mine", STOPS)
    assert backend.generate(REQUESTS, SAMPLING, 3, lambda place, group: told.append((place, group))) is groups
    assert told == [(0, groups[0])]


def test_a_group_is_looked_at_before_it_is_handed_on():
    groups = [[completion(), completion(logprobs=[-1.0])], [completion()]]
    with pytest.raises(UserError, match="prompt 7, completion 1"):
        CheckedBackend(Returns(groups), "mine", STOPS).generate(
            REQUESTS, SAMPLING, 3, lambda *group: pytest.fail("handed on")
        )


def test_another_policy_version_is_an_error_that_names_both():
    groups = [[completion(), completion(version=2)], [completion()]]
    with pytest.raises(RunError, match="mine: generate: asked for policy version 3, it sampled from 2"):
        CheckedBackend(Returns(groups), "mine", STOPS).generate(REQUESTS, SAMPLING, 3)


def test_sync_gives_metrics():
    with pytest.raises(
        UserError, match=r"^mine: sync: it returned None; expected a dict of metrics by name, such as \{\}$"
    ):
        CheckedBackend(Returns(None), "mine", STOPS).sync(None, 1)


def test_with_an_environment_it_must_take_turns(find):
    said = r"Mine: generate takes no turns, and the recipe has an environment: add an argument turns=None\. Where .*"
    with pytest.raises(UserError, match=said):
        find(RIGHT, environment="one")
    takes = RIGHT.replace("on_group=None", "on_group=None, turns=None")
    find(takes, file="takes.py", environment="one")
    find(RIGHT.replace("on_group=None", "on_group=None, **more"), file="more.py", environment="one")
    more = "    def submit(self, requests, sampling, version): ...\n    def collect(self, flight): ...\n"
    with pytest.raises(UserError, match="Mine: submit takes no turns"):
        find(takes + more, file="ahead.py", environment="one", max_staleness=1)


class Plays:
    """Two turns of two tokens; ``spoil`` makes something of the episode of the last request."""

    def __init__(self, spoil=lambda tokens, turns: tokens):
        self.spoil = spoil

    def generate(self, requests, sampling, version, on_group=None, turns=None):
        return [[self.one((r, g), turns) for g in range(len(request.keys))] for r, request in enumerate(requests)]

    def one(self, place, turns):
        tokens, start, reply = [], 0, []
        while reply is not None:
            start, tokens = len(tokens) + len(reply), [*tokens, *reply, 5, 77]
            reply = turns.answer(place, tokens, start, "stop", last=False).result()
        spoilt = self.spoil(tokens, turns) if place[0] == 1 else tokens
        return completion(spoilt, [-0.5] * len(spoilt))


EPISODES = {
    "": lambda tokens, turns: tokens,
    "its tokens 2 to 4 are not those that the environment answered": lambda t, _: [*t[:2], 8, *t[3:]],
    "it goes on behind token 6, where the environment ended it": lambda t, _: [*t, 4],
    "it goes on behind token 0, which is 77, an end-of-sequence token; .*": lambda t, _: [77, *t[1:]],
    "a turn was said to begin at token 2; .* end at 4": lambda t, turns: (
        turns.of[1, 0].__setitem__(1, (2, 6, None)) or t
    ),
    "the answer to its turn of tokens 4 to 6 was not waited for": lambda t, turns: (
        turns.of[1, 0].__setitem__(1, (4, 6, Future())) or t
    ),
    "turns.answer was not called for it, at place \\(1, 0\\).*": lambda t, turns: turns.of.pop((1, 0)) and t,
    "it ends with an answer of the environment; .*": lambda t, turns: turns.of[1, 0].pop() and t[:4],
    r"the model drew 4 tokens of it, more than max_completion_length \(3\)": lambda t, _: t,
}


@pytest.mark.parametrize("said", EPISODES)
def test_wrong_episodes_are_refused(said):
    backend = CheckedBackend(Plays(EPISODES[said]), "mine", STOPS)
    turns = Answering(lambda place, turn: [9, 77] if turn == 0 else None)
    sampling = Sampling(3) if "drew" in said else SAMPLING
    if not said:
        assert len(backend.generate(REQUESTS, sampling, 3, turns=turns)) == 2
        return
    with pytest.raises(UserError, match=rf"^mine: generate: prompt \d, completion 0: {said}"):
        backend.generate(REQUESTS, sampling, 3, turns=turns)
