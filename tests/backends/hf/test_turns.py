"""Episodes in the engine: what the model draws behind an answer is what it computes of the whole; who waits is kept."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.backends.base import Request, Sampling
from grpo.backends.hf import engine as engine_module
from grpo.backends.hf import kv_cache
from grpo.backends.hf.backend import HFBackend
from grpo.backends.hf.budget import Budget
from grpo.backends.hf.draw import Distribution
from grpo.backends.hf.engine import Engine, drawing
from grpo.backends.hf.kv_cache import DecodeCache
from grpo.backends.hf.step import Extension
from grpo.backends.hf.step_compiled import DecodeStep, why_not
from grpo.backends.sequence import SampledSequence
from grpo.errors import RunError, UserError
from grpo.model.logprob_lm import LogprobLM
from grpo.model.policy import Policy
from grpo.types import Completion, Status
from tests.answering import Answering, by_place
from tests.backends.hf.test_engine import requests, step_of
from tests.backends.hf.test_models import FAMILIES, REQUESTS, Family, policy_of
from tests.conftest import make_policy

LIMIT = 16  # tokens that the model draws in an episode
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
CHUNKS = {"layer_types": ["chunked_attention", "full_attention", "chunked_attention"], "attention_chunk_size": 12}
SINKS = {"sliding_window": 8, "tie_word_embeddings": False}
OTHERS = {
    "Gemma 2": Family(
        "gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0}, "", ""
    ),
    "gpt-oss": Family("gpt_oss", EXPERTS | SINKS, "", ""),
    "Llama 4": Family("llama4_text", EXPERTS | CHUNKS | {"intermediate_size_mlp": 64}, "", ""),
}
COPIED, APART = kv_cache.SHORT_PROMPT, 0  # in the cache's two layouts
CASES = [("Qwen2.5", COPIED), ("Qwen2.5", APART), ("Gemma 3", APART), ("Gemma 2", COPIED), ("gpt-oss", APART)]
CASES += [("gpt-oss", COPIED), ("Llama 4", APART), ("Qwen3.5", COPIED), ("LFM2 with biases", COPIED)]


def episodes_hold(policy: Policy, wanted: list[Request], found: dict[Any, Any], turns: Answering) -> None:
    """Every token that the model drew has the log-probability of one forward pass over the whole episode, and all
    others are the environment's, as it gave them."""
    for at, (tokens, logprobs) in found.items():
        prompt, calls = wanted[at[0]].prompt.token_ids, turns.of(at)
        with torch.no_grad():
            logits = policy.causal_lm(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        whole: list[int] = []
        for call in calls:
            assert call.start == len(whole)
            assert call.tokens[: len(whole)] == whole
            drawn = range(call.start, len(call.tokens))
            torch.testing.assert_close(torch.tensor([logprobs[i] for i in drawn]), expected[drawn], atol=1e-4, rtol=0)
            whole = [*call.tokens, *(call.reply or [])]
            assert logprobs[len(call.tokens) : len(whole)] == [0.0] * len(call.reply or [])
        assert calls[-1].reply is None
        assert whole == tokens


def by_place_of(groups: list[list[Completion]]) -> dict[tuple[int, int], tuple[list[int], list[float]]]:
    return {
        (r, g): (list(c.token_ids), list(c.sampler_logprobs))
        for r, group in enumerate(groups)
        for g, c in enumerate(group)
    }


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="one case is the compiled step's")
@pytest.mark.parametrize(("name", "short"), CASES, ids=lambda value: str(value))
def test_an_episode_is_what_one_forward_pass_computes(
    name: str, short: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, soft-capping, sinks, chunks, recurrent layers; rows of one group wait and come back at other times."""
    monkeypatch.setattr(kv_cache, "SHORT_PROMPT", short)
    monkeypatch.setitem(FAMILIES, name, (FAMILIES | OTHERS)[name])
    policy = policy_of(name, tiny_model)
    monkeypatch.setattr(policy, "stop_token_ids", [1, 5, 9, 20, 33, 50, 77])
    backend, turns = HFBackend(policy, max_batch_size=64, turns=True), Answering(max_turn_length=7)
    backend.sync(policy, 0)
    groups = backend.generate(REQUESTS, Sampling(LIMIT), 0, turns=turns)
    episodes_hold(policy, REQUESTS, by_place_of(groups), turns)
    drawn = dict.fromkeys(by_place_of(groups), 0)
    for call in turns.asked:
        of_turn = len(call.tokens) - call.start
        drawn[call.place] += of_turn
        assert call.last == (drawn[call.place] == LIMIT)
        assert (call.ended == "stop") == (call.tokens[-1] in policy.stop_token_ids)
        assert of_turn <= 7
        assert call.ended == "stop" or of_turn == 7 or call.last
        completion = groups[call.place[0]][call.place[1]]
        if call.reply is None:
            assert completion.status is (Status.STOP if call.ended == "stop" else Status.LENGTH)
            assert [(s.start, s.end, s.version) for s in completion.versions] == [(0, len(call.tokens), 0)]
    assert {call.ended for call in turns.asked} == {"stop", "length"}
    assert {call.last for call in turns.asked} == {True, False}


def play(
    policy: Policy, wanted: list[Request], turns: Answering, *, tokens: int = 10**6, limit: int = 40
) -> tuple[dict[tuple[int, int], tuple[list[int], list[float]]], Engine, list[int]]:
    """Episodes, the engine, and the number of rows in each decoding step."""
    budget = Budget.of(wanted, limit + turns.max_environment_tokens, 512, tokens)
    rows, step = [], step_of(policy)

    def counted(tokens_B: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        rows.append(len(tokens_B))
        return step(tokens_B, cache)

    engine = Engine(
        LogprobLM(policy.causal_lm),
        wanted,
        Sampling(limit),
        lambda key, ids: ids[-1] % 6 == 1,
        budget=budget,
        cache=DecodeCache(budget.first_shape(), policy.device, in_place=isinstance(step, DecodeStep)),
        next_tokens=drawing(counted, Distribution()),
        turns=turns,
    )
    policy.causal_lm.eval()
    with torch.no_grad():
        found = {(s.request, s.sample): (s.tokens, s.logprobs) for s in engine.run()}
    assert not engine.parked
    assert not engine.running
    return found, engine, rows


@pytest.mark.usefixtures("both_layouts")
def test_who_waits_is_not_decoded_and_nothing_is_computed_again(tiny_model: Path) -> None:
    """Tokens that go through the model: prompts once; a turn's but the last, which with the answer goes by a pass of
    its own."""
    policy, turns = make_policy(tiny_model), Answering(overlap_steps=2)
    wanted = requests(policy, 4, 6)
    shapes: list[tuple[int, int]] = []
    hook = policy.causal_lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found, engine, rows = play(policy, wanted, turns)
    hook.remove()
    episodes_hold(policy, wanted, found, turns)
    answers = [call.reply for call in turns.asked if call.reply is not None]
    assert len(answers) > 30
    assert shapes[0] == (4, 9), "the prompts"
    if why_not(policy.causal_lm) is None:  # else decoding steps are among them
        passes = shapes[1:]
        assert sum(B for B, _ in passes) == len(answers)
        assert max(T for _, T in passes) == max(map(len, answers)) + 1
        assert len(passes) < len(answers) / 2, "several go in together"
    drawn = sum(len(call.tokens) - call.start for call in turns.asked)
    assert sum(rows) == drawn - len(turns.asked), "the first token of each turn is drawn behind a prompt or an answer"
    assert engine.preemptions == 0


@pytest.mark.usefixtures("both_layouts")
def test_preempted_episodes_are_computed_again_with_what_was_answered(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(tiny_model)
    wanted = requests(policy, 4, 4)
    rule = {"max_environment_tokens": 80, "reply": lambda place, turn: by_place(place, turn % 2) if turn < 6 else None}
    everything, unbounded, _ = play(policy, wanted, Answering(**rule), limit=60)
    assert unbounded.preemptions == 0
    turns, preempted, preempt = Answering(**rule), [], Engine._preempt
    monkeypatch.setattr(
        Engine, "_preempt", lambda self, some: (preempted.extend(s.reply for s in some), preempt(self, some))
    )
    bounded, engine, _ = play(policy, wanted, turns, tokens=420, limit=60)
    assert None in preempted
    assert any(reply is not None for reply in preempted), "also who waits"
    assert engine.cache.shape.tokens() <= 420
    episodes_hold(policy, wanted, bounded, turns)
    assert {at: tokens for at, (tokens, _) in bounded.items()} == {at: t for at, (t, _) in everything.items()}


def test_how_long_an_answer_takes_changes_no_bit(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    wanted = requests(policy, 3, 4)
    at_once, late = (play(policy, wanted, Answering(seconds=seconds), limit=20)[0] for seconds in (0.0, 0.03))
    assert at_once == late
    assert play(policy, wanted, Answering(overlap_steps=20), limit=20)[0].keys() == at_once.keys()


def test_an_answer_is_waited_for_after_a_number_of_steps(tiny_model: Path) -> None:
    """Between ``overlap_steps`` and twice as many, unless nothing else runs."""
    waited: list[tuple[int, int]] = []

    class Watched(Answering):
        engine: Engine

        def answer(self, *args: Any, **named: Any) -> Future[list[int] | None]:
            future, engine = super().answer(*args, **named), self.engine
            asked_at, result = engine.steps, future.result
            future.result = lambda: (waited.append((engine.steps - asked_at, len(engine.running))), result())[1]
            return future

    policy, turns = make_policy(tiny_model), Watched(overlap_steps=3)
    made = Engine.run

    def run(engine: Engine) -> Any:
        turns.engine = engine
        return made(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run", run)
        play(policy, requests(policy, 4, 6), turns)
    others_ran = [steps for steps, running in waited if running]
    assert len(others_ran) > 20
    assert set(others_ran) <= {3, 4, 5, 6}
    assert len(waited) == len(turns.asked)


def test_with_several_tokens_between_two_looks_an_episode_is_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: what was drawn beyond a turn's end is thrown away, and the cache is cut there."""
    policy = make_policy(tiny_model)
    wanted = requests(policy, 3, 5)
    expected, _, _ = play(policy, wanted, Answering())
    monkeypatch.setattr(engine_module, "BURST", {})
    turns = Answering()
    found, _, _ = play(policy, wanted, turns)
    episodes_hold(policy, wanted, found, turns)
    assert {at: tokens for at, (tokens, _) in found.items()} == {at: tokens for at, (tokens, _) in expected.items()}


def test_stop_strings_are_looked_for_in_the_turns_own_tokens(tiny_model: Path) -> None:
    """An answer that holds one ends nothing, neither whole nor together with what the model draws next."""
    policy = make_policy(tiny_model)
    seven, yes = (policy.tokenizer.encode(text, add_special_tokens=False) for text in ("7", "yes"))
    turns = Answering(lambda place, turn: [*seven, *yes] if turn < 3 else None, stop=["yes"], max_environment_tokens=9)
    backend = HFBackend(policy, max_batch_size=64)
    backend.sync(policy, 0)
    backend.generate(requests(policy, 6, 6), Sampling(30, stop=["7"]), 0, turns=turns)
    of_turns = [(policy.tokenizer.decode(c.tokens[c.start :]), c) for c in turns.asked]
    ended = [text for text, call in of_turns if call.ended == "stop" and call.tokens[-1] not in policy.stop_token_ids]
    assert all(("7" in text) or ("yes" in text) for text in ended)
    assert len(ended) > 5
    assert not any("7" in policy.tokenizer.decode(c.tokens[c.start : -1]) for _, c in of_turns)
    assert any(len(call.tokens) - call.start > 3 for _, call in of_turns if call.start)


def test_an_environment_that_breaks_its_word_ends_the_run(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    with pytest.raises(RunError, match="added 4 tokens to an episode, and said that it adds 3 at most"):
        play(policy, requests(policy, 1, 2), Answering(lambda place, turn: [5, 6, 7, 8], max_environment_tokens=3))

    class Answers(Answering):
        def answer(self, *args: Any, last: bool, **named: Any) -> Future[list[int] | None]:
            return super().answer(*args, last=False, **named)

    with pytest.raises(RunError, match="answered the last turn of an episode"):
        play(policy, requests(policy, 1, 2), Answers(lambda place, turn: [5], max_environment_tokens=99), limit=4)


def test_an_environments_error_is_raised(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)

    class Fails(Answering):
        def answer(self, *args: Any, **named: Any) -> Future[list[int] | None]:
            future: Future[list[int] | None] = Future()
            future.set_exception(RunError("no environment can be started any more"))
            return future

    with pytest.raises(RunError, match="no environment can be started"):
        play(policy, requests(policy, 1, 2), Fails())


def test_a_model_that_computes_answers_otherwise_is_refused_at_start(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, of = make_policy(tiny_model), Extension.of

    def all_at_one_position(*args: Any) -> Extension:
        made = of(*args)
        object.__setattr__(made, "positions_BT", made.positions_BT[:, :1].expand_as(made.positions_BT))
        return made

    monkeypatch.setattr(Extension, "of", all_at_one_position)
    HFBackend(policy, max_batch_size=4)
    with pytest.raises(UserError, match=r"decodes to other logits in the hf backend"):
        HFBackend(policy, max_batch_size=4, turns=True)


def test_a_turn_of_no_environment_is_the_whole_completion() -> None:
    tokens = [1, 2, 3]
    assert SampledSequence(0, 0, 0, tokens).turn() is tokens
    assert SampledSequence(0, 0, 0, tokens, start=2, answered=2).turn() == [3]
    assert SampledSequence(0, 0, 0, tokens, start=2, answered=2).drawn == 1
