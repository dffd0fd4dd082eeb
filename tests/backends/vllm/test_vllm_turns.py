"""Episodes through the vLLM backend: a request for each turn, to fake engines that compute with transformers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.backends.base import Sampling
from grpo.backends.vllm.backend import VLLMBackend
from grpo.errors import RunError
from grpo.model.policy import Policy
from grpo.randomness import key
from grpo.types import Completion, Status, VersionSpan
from tests.answering import Answering
from tests.backends.vllm.test_vllm_backend import LORA, QUESTIONS, adapted, in_time, requests, shift, versions
from tests.backends.vllm.test_vllm_pool import wait_for
from tests.fake_vllm_engine import GENERATE, FakeEngine

Connect = Callable[..., VLLMBackend]


def episodes_hold(policy: Policy, groups: list[list[Completion]], turns: Answering) -> None:
    """The model's tokens have the log-probabilities of a forward pass over the whole; the others are the answers."""
    for r, group in enumerate(groups):
        prompt = policy.tokenizer.encode(QUESTIONS[r], add_special_tokens=False)
        for g, c in enumerate(group):
            with torch.no_grad():
                logits = policy.causal_lm(input_ids=torch.tensor([prompt + c.token_ids])).logits[0]
            expected = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
            whole: list[int] = []
            for call in turns.of((r, g)):
                assert call.start == len(whole)
                drawn = range(call.start, len(call.tokens))
                found = torch.tensor([c.sampler_logprobs[i] for i in drawn])
                torch.testing.assert_close(found, expected[drawn], atol=1e-4, rtol=0)
                whole = [*call.tokens, *(call.reply or [])]
                assert c.sampler_logprobs[len(call.tokens) : len(whole)] == [0.0] * len(call.reply or [])
            assert whole == c.token_ids


def test_a_turn_is_a_request_with_all_that_was_before_it(connect: Connect, engine: FakeEngine, policy: Policy) -> None:
    backend = connect(engine, max_completion_length=24)
    backend.sync(policy, 3)
    engine.asked.clear()
    turns = Answering(stop=["="], max_turn_length=9)
    groups = backend.generate(requests(policy), Sampling(24, stop=["yes"]), 3, turns=turns)
    episodes_hold(policy, groups, turns)
    assert {tuple(c.versions) for group in groups for c in group} == {
        (VersionSpan(0, len(c.token_ids), 3),) for group in groups for c in group
    }
    asked = {tuple(body["token_ids"]): body for path, body in engine.asked if path == GENERATE}
    assert len(asked) >= len(turns.asked) - 2  # the first turns of a group have one prompt
    for call in turns.asked:
        r, g = call.place
        prompt = policy.tokenizer.encode(QUESTIONS[r], add_special_tokens=False)
        turn = turns.of(call.place).index(call)
        given = asked[tuple(prompt + call.tokens[: call.start])]["sampling_params"]
        own = sum(len(one.tokens) - one.start for one in turns.of(call.place)[:turn])
        assert given["max_tokens"] == min(9, 24 - own)
        assert given["stop"] == ["yes", "="]
        if turn:
            assert given["seed"] == key(key(0, r, g), turn) >> 1
    statuses = [c.status for group in groups for c in group]
    last = [turns.of((r, g))[-1].ended for r in range(2) for g in range(2)]
    assert statuses == [Status.STOP if ended == "stop" else Status.LENGTH for ended in last]


def test_an_episode_that_waits_holds_up_no_other(connect: Connect, engine: FakeEngine, policy: Policy) -> None:
    held: list[tuple[Future[Any], Any]] = []

    class HoldsOne(Answering):
        def answer(self, place: Any, *args: Any, **named: Any) -> Future[list[int] | None]:
            reply = super().answer(place, *args, **named)
            if place != (0, 0) or held:
                return reply
            held.append((Future(), reply.result()))
            return held[0][0]

    backend, turns = connect(engine), HoldsOne(max_turn_length=4)
    backend.sync(policy, 0)
    told: list[int] = []

    def on_group(place: int, group: list[Completion]) -> None:
        told.append(place)
        if place == 1:  # while the first still waits
            held[0][0].set_result(held[0][1])

    groups = in_time(lambda: backend.generate(requests(policy), Sampling(12), 0, on_group, turns=turns))
    assert told == [1, 0]
    episodes_hold(policy, groups, turns)


def test_of_an_episode_on_a_lost_server_the_turn_alone_is_asked_again(
    connect: Connect, engine: FakeEngine, policy: Policy
) -> None:
    backend = connect(engine)
    backend.sync(policy, 0)
    expected = backend.generate(requests(policy), Sampling(12), 0, turns=Answering(max_turn_length=4))
    turns = Answering(max_turn_length=4)
    sample, lost = engine.completion, []

    def lose_once(body: dict[str, Any]) -> Any:
        if not lost and len(turns.asked) >= 4:
            lost.append(body["token_ids"])
            return 500, "gone"
        return sample(body)

    engine.routes[GENERATE] = lose_once
    assert in_time(lambda: backend.generate(requests(policy), Sampling(12), 0, turns=turns)) == expected
    assert lost
    places = [(call.place, call.start) for call in turns.asked]
    assert len(places) == len(set(places)), "no turn is answered twice"


@pytest.mark.parametrize("lora", [None, LORA])
def test_turns_after_new_weights_say_so(
    connect: Connect, engine: FakeEngine, policy: Policy, tiny_model: Path, lora: dict[str, Any] | None
) -> None:
    """Episodes go on while weights are replaced: what was drawn before keeps its version and log-probabilities."""
    policy = adapted(tiny_model) if lora else policy
    held: list[tuple[Future[Any], Any]] = []

    class Holds(Answering):
        def answer(self, *args: Any, **named: Any) -> Future[list[int] | None]:
            held.append((Future(), super().answer(*args, **named).result()))
            return held[-1][0]

    adapters = {"lora": lora, "vllm_lora_sync": "adapter"} if lora else {}
    backend = connect(engine, policy=policy, max_staleness=1, **adapters)
    turns = Holds(lambda _, turn: [7, 8] if turn < 1 else None, max_turn_length=4)
    backend.sync(policy, 0)
    flight = backend.submit(requests(policy), Sampling(12), 0, turns=turns)
    wait_for(lambda: len(held) == 4)
    if not lora:
        shift(policy)
    backend.sync(policy, 1)
    first, held[:] = list(held), []
    for future, reply in first:
        future.set_result(reply)
    wait_for(lambda: len(held) == 4)
    for future, reply in held:
        future.set_result(reply)
    groups = backend.collect(flight)
    assert versions(groups) == {0, 1}
    for r, group in enumerate(groups):
        for g, completion in enumerate(group):
            start = turns.of((r, g))[1].start
            assert completion.versions == [VersionSpan(0, start, 0), VersionSpan(start, len(completion.token_ids), 1)]


def test_an_environments_error_ends_the_rollout(connect: Connect, engine: FakeEngine, policy: Policy) -> None:
    class Fails(Answering):
        def answer(self, *args: Any, **named: Any) -> Future[list[int] | None]:
            future: Future[list[int] | None] = Future()
            future.set_exception(RunError("no environment can be started any more"))
            return future

    backend = connect(engine)
    backend.sync(policy, 0)
    with pytest.raises(RunError, match="no environment can be started"):
        in_time(lambda: backend.generate(requests(policy), Sampling(12), 0, turns=Fails()))
