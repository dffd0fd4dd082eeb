"""The backend and its keeper against fake engines: weights, checks, lost servers, errors that reach every process."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.backends.base import Request, Sampling
from grpo.backends.vllm import backend as backend_module
from grpo.backends.vllm import transfer, trust
from grpo.backends.vllm.backend import VLLMBackend
from grpo.backends.vllm.transfer import IpcSender
from grpo.errors import BackendFailed, RunError, UserError
from grpo.model.policy import Policy
from grpo.randomness import key
from grpo.types import Completion, Prompt
from tests.conftest import make_policy
from tests.fake_vllm_engine import GENERATE, FakeEngine

QUESTIONS = ["6 3 9 = 27", "1 2 3 = 6"]


def requests(policy: Policy, G: int = 2) -> list[Request]:
    encoded = [policy.tokenizer.encode(q, add_special_tokens=False) for q in QUESTIONS]
    prompts = [Prompt(i, q, q, ids) for i, (q, ids) in enumerate(zip(QUESTIONS, encoded, strict=True))]
    return [Request(p, [key(0, p.id, g) for g in range(G)]) for p in prompts]


def versions(completions: list[list[Completion]]) -> set[int]:
    return {span.version for group in completions for c in group for span in c.versions}


def shift(policy: Policy, amount: float = 0.02) -> None:
    """Another policy: every weight moves a little."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.causal_lm.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


def in_time(work: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What ``work`` gives or raises, in a thread of its own: a hang fails the test instead of holding it up."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"it did not end within {seconds} s"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


# --- weights and checks ---


def test_what_is_sampled_comes_from_the_policys_weights(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    backend = connect(engine)
    for version in range(2):
        metrics = backend.sync(policy, version)
        assert metrics["sampling/probe_logp_difference/max"] < 1e-4
        for request, group in zip(
            requests(policy), backend.generate(requests(policy), Sampling(12), version), strict=True
        ):
            for completion in group:
                ids = torch.tensor([request.prompt.token_ids + completion.token_ids])
                with torch.no_grad():
                    logps = policy.causal_lm.eval()(input_ids=ids).logits[0].log_softmax(-1)
                place = len(request.prompt.token_ids) - 1
                expected = [float(logps[place + i, t]) for i, t in enumerate(completion.token_ids)]
                assert completion.sampler_logprobs == pytest.approx(expected, abs=1e-4)
                assert [(s.start, s.end, s.version) for s in completion.versions] == [(0, len(expected), version)]
        shift(policy)


def test_a_group_is_handed_over_while_others_are_still_sampled(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    backend = connect(engine)
    backend.sync(policy, 0)
    asked, groups = requests(policy), {}
    engine.waits = lambda body: body["token_ids"] == asked[0].prompt.token_ids and not groups

    def on_group(place: int, completions: list[Completion]) -> None:
        groups[place] = completions

    found = in_time(lambda: backend.generate(asked, Sampling(6), 0, on_group))
    assert list(groups.items()) == [(1, found[1]), (0, found[0])]


def test_weights_are_labelled_and_old_keys_and_values_dropped_before_anything_is_sampled(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    connect(engine).sync(policy, 3)
    order = [path for path in engine.paths() if path not in ("/health", "/version", "/server_info")]
    assert order[:6] == [
        "/pause",
        "/collective_rpc",
        "/update_weight_version",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/resume",
    ]
    assert set(order[6:]) == {GENERATE}
    assert engine.label == "3"


def test_an_engine_sleeps_once_a_step_and_wakes_in_the_order_in_which_memory_is_needed(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    """Weights, the transfer and its comparison, then keys and values. Rounds of a step find it awake."""
    asked: list[str] = []
    answer = engine.on_workers

    def on_workers(body: dict[str, Any]) -> Any:
        asked.append(body["method"])
        return answer(body)

    engine.routes["/collective_rpc"] = on_workers
    backend = connect(engine)
    backend.sleeps = True
    backend.sync(policy, 0)
    engine.routes |= {
        path: lambda body, path=path: asked.append(path) or {}  # type: ignore[func-returns-value, misc]
        for path in ("/sleep", "/wake_up", "/pause", "/resume")
    }
    for version in (1, 2):
        for _ in range(3):
            backend.generate(requests(policy), Sampling(4), version - 1)
        asked.clear()
        backend.rest()
        assert asked == ["/sleep"]
        asked.clear()
        backend.sync(policy, version)
        assert asked == ["/wake_up", "/pause", "grpo_load", "grpo_fingerprint", "/wake_up", "/resume"]
    queries = [query for path, query in engine.queries if path in ("/sleep", "/wake_up")]
    assert queries == ["level=2&mode=wait", "tags=weights", "tags=kv_cache"] * 2


def test_gathered_weights_are_gone_when_an_engine_takes_memory_for_keys_and_values(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[weakref.ref[torch.Tensor]] = []
    found: list[bool] = []

    def full_state(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        state = {name: tensor.clone() for name, tensor in Policy.full_state(policy, dtype).items()}
        gathered[:] = [weakref.ref(tensor) for tensor in state.values()]
        return state

    monkeypatch.setattr(policy, "full_state", full_state)
    engine.routes["/wake_up"] = lambda body: found.append(any(ref() is not None for ref in gathered)) or {}  # type: ignore[func-returns-value]
    backend = connect(engine)
    backend.sync(policy, 0)
    backend.asleep = True
    backend.sync(policy, 1)
    assert found[-1] is False


@pytest.mark.parametrize(("way", "level"), [("merged", 2), ("adapter", 1)])
def test_frozen_weights_that_come_once_are_kept_through_the_sleep(
    connect: Callable[..., VLLMBackend], tiny_model: Path, engine: FakeEngine, way: str, level: int
) -> None:
    backend = connect(engine, policy=adapted(tiny_model), lora=LORA, vllm_lora_sync=way)
    backend.sync(backend.policy, 0)
    backend.sleeps = True
    backend.rest()
    assert engine.queries[-1] == ("/sleep", f"level={level}&mode=wait")


def test_an_engine_that_starts_gets_longer_than_a_server_that_is_lost(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy, tmp_path: Path
) -> None:
    backend = connect(engine, seconds=0.1)
    engine.die()
    starting = SimpleNamespace(
        starting=True, started=time.monotonic(), exit_code=lambda: None, log=tmp_path / "log", last_lines=lambda: "  …"
    )
    backend.keeper.engine = starting  # type: ignore[assignment]
    backend.keeper.rollout = backend.rollout.model_copy(update={"vllm_start_timeout": 0.4})
    began = time.monotonic()
    with pytest.raises(BackendFailed, match=r"did not answer within rollout\.vllm_start_timeout \(0\.4 s\).*\n  …"):
        in_time(lambda: backend.sync(policy, 0))
    assert time.monotonic() - began > 0.3
    backend.keeper.engine = None
    engine.start()


def test_an_engine_that_keeps_its_weights_is_caught(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    backend = connect(engine)
    backend.sync(policy, 0)
    engine.worker.reload_weights = lambda weights_iterator: None  # type: ignore[method-assign]
    shift(policy, 1e-6)
    with pytest.raises(BackendFailed, match=r"does not hold the policy's weights of version 1: (\d+) of \1 parameters"):
        backend.sync(policy, 1)


def test_an_engine_at_another_temperature_is_caught(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    def cooler(body: dict[str, Any]) -> Any:
        return engine.completion(body | {"sampling_params": body["sampling_params"] | {"temperature": 0.7}})

    engine.routes[GENERATE] = cooler
    with pytest.raises(BackendFailed, match=r"They are those of temperature 0\.7; the recipe's is 1$"):
        connect(engine).sync(policy, 0)


@pytest.mark.parametrize("unknown", [None, -9999.0, math.nan])
def test_a_token_without_a_logprob_ends_neither_the_probe_nor_a_rollout(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy, unknown: float | None
) -> None:
    """It is nan, which the update leaves out and counts. Many of them are an engine that computes wrongly."""
    every = 24

    def holes(body: dict[str, Any]) -> Any:
        answer = engine.completion(body)
        for place, entry in enumerate(answer["choices"][0]["logprobs"]["content"]):
            if place % every == 3:
                entry["logprob"] = unknown
        return answer

    engine.routes[GENERATE] = holes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "PROBE_TOKENS", 24)
        backend = connect(engine)
        found = backend.sync(policy, 0)
    assert found["sampling/probe_logp_difference/max"] < 1e-3
    completions = [c for group in backend.generate(requests(policy), Sampling(6), 0) for c in group]
    for completion in completions:
        gaps = [place for place, logprob in enumerate(completion.sampler_logprobs) if math.isnan(logprob)]
        assert gaps == [3][: len(completion.token_ids) > 3]
    assert any(math.isnan(logprob) for completion in completions for logprob in completion.sampler_logprobs)
    every = 4
    with pytest.raises(BackendFailed, match="does not sample from the policy's distribution"):
        backend.sync(policy, 1)


def test_completions_of_a_version_that_cannot_be_are_refused(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    backend = connect(engine)
    backend.sync(policy, 4)
    engine.label = "7"
    with pytest.raises(RunError, match="asked of policy version 4 was made by version 7: something else gives weights"):
        backend.generate(requests(policy), Sampling(4), 4)
    with pytest.raises(RunError, match="rollout asked for policy version 5, the vllm backend holds 4"):
        backend.generate(requests(policy), Sampling(4), 5)


# --- adapters ---

LORA = {"r": 4, "lora_alpha": 10}


def adapted(tiny_model: Path) -> Policy:
    policy = make_policy(tiny_model, model={"lora": LORA})
    for name, parameter in policy.causal_lm.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return policy


@pytest.mark.slow
@pytest.mark.parametrize(("staleness", "held"), [(0, 2), (2, 3)])
def test_each_step_has_adapters_of_its_own_and_those_that_nobody_uses_any_more_go(
    connect: Callable[..., VLLMBackend], tiny_model: Path, engine: FakeEngine, staleness: int, held: int
) -> None:
    policy = adapted(tiny_model)
    backend = connect(engine, policy=policy, lora=LORA, vllm_lora_sync="adapter", max_staleness=staleness)
    loads = []
    for version in range(4):
        engine.asked.clear()
        backend.sync(policy, version)
        loads.append([body["method"] for path, body in engine.asked if path == "/collective_rpc"].count("grpo_load"))
        assert versions(backend.generate(requests(policy), Sampling(4), version)) == {version}
        assert {body["model"] for path, body in engine.asked if path == GENERATE} == {f"grpo-{version}"}
        assert list(engine.adapters) == [f"grpo-{v}" for v in range(max(version + 1 - held, 0), version + 1)]
        assert {path.name for path in backend.keeper.scratch.glob("grpo-*")} == set(engine.adapters)
    assert loads == [1, 0, 0, 0], "the frozen weights go over once"


def test_adapters_of_the_step_before_are_caught(
    connect: Callable[..., VLLMBackend], tiny_model: Path, engine: FakeEngine
) -> None:
    policy = adapted(tiny_model)
    backend = connect(engine, policy=policy, lora=LORA, vllm_lora_sync="adapter")
    backend.sync(policy, 0)
    engine.routes["/v1/load_lora_adapter"] = lambda body: "Success"
    for name, parameter in policy.causal_lm.named_parameters():
        if "lora_A" in name:
            parameter.data.add_(1e-5 * torch.randn(parameter.shape))
    with pytest.raises(BackendFailed, match=r"version 1: \d+ of \d+ parameters differ after the transfer: .*\.lora_A"):
        backend.sync(policy, 1)


def test_a_run_that_goes_on_replaces_the_adapters_that_it_left_on_a_server(
    connect: Callable[..., VLLMBackend], tiny_model: Path, engine: FakeEngine
) -> None:
    policy = adapted(tiny_model)
    for _ in range(2):
        backend = connect(engine, policy=policy, lora=LORA, vllm_lora_sync="adapter")
        for version in (5, 6):
            backend.sync(policy, version)
        assert engine.adapters["grpo-6"].parent == backend.keeper.scratch


def test_adapters_are_given_again_to_a_server_that_was_started_again(
    connect: Callable[..., VLLMBackend], tiny_model: Path, engine: FakeEngine
) -> None:
    policy = adapted(tiny_model)
    backend = connect(engine, policy=policy, lora=LORA, vllm_lora_sync="adapter")
    backend.sync(policy, 5)
    engine.start_again()
    assert versions(backend.generate(requests(policy), Sampling(4), 5)) == {5}
    assert list(engine.adapters) == ["grpo-5"]


# --- servers that are lost ---


def test_a_server_that_was_started_again_gets_the_weights_before_it_samples(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    backend = connect(engine)
    backend.sync(policy, 0)
    expected = backend.generate(requests(policy), Sampling(8), 0)
    engine.start_again()
    assert backend.generate(requests(policy), Sampling(8), 0) == expected
    assert engine.label == "0"


def test_a_server_that_answers_and_takes_no_weights_passes_its_deadline(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    """Such as one that does not see the folder that weights are written in."""
    load = engine.routes["/collective_rpc"]
    missing = (500, {"error": {"message": "FileNotFoundError: no .safetensors file in /dev/shm/x"}})
    engine.routes["/collective_rpc"] = lambda body: missing if body["method"] == "grpo_load" else load(body)
    backend = connect(engine, seconds=0.3)
    with pytest.raises(BackendFailed) as failed:
        in_time(lambda: backend.sync(policy, 2))
    text = str(failed.value)
    assert text.startswith(f"rank 0, step 2: vllm server {engine.url} ")
    assert "rollout.vllm_server_timeout (0.3 s)" in text
    assert "no .safetensors file in /dev/shm/x" in text
    assert len(engine.paths()) < 100, "it is given time between two tries"


def test_a_server_that_is_gone_passes_its_deadline(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    backend = connect(engine, seconds=0.3)
    backend.sync(policy, 0)
    engine.die()
    with pytest.raises(BackendFailed, match=r"rank 0, step 0: vllm server http\S+ did not answer within rollout\."):
        in_time(lambda: backend.generate(requests(policy), Sampling(8), 0))
    engine.start()


def test_servers_that_keep_dying_on_the_same_requests_end_the_run(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    backend = connect(engine)
    backend.sync(policy, 0)
    asked = 12  # tokens: those of the probe are more
    engine.routes[GENERATE] = lambda body: (
        (500, "out of memory") if body["sampling_params"]["max_tokens"] == asked else engine.completion(body)
    )
    with pytest.raises(
        BackendFailed, match=r"servers were lost 5 times within one rollout; last error: .*out of memory"
    ):
        in_time(lambda: backend.generate(requests(policy), Sampling(asked), 0))


def test_settings_that_do_not_fit_are_the_users_to_change(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    engine.settings["model_config"]["max_model_len"] = 75
    with pytest.raises(
        UserError, match=r"its --max-model-len is 75; .* together are 76\. launch/vllm_serve\.sh starts"
    ):
        connect(engine).sync(policy, 0)


def test_a_server_that_comes_back_with_other_settings_ends_the_run_with_a_checkpoint(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    backend = connect(engine)
    backend.sync(policy, 0)
    engine.start_again()
    engine.settings["model_config"]["dtype"] = "torch.bfloat16"
    with pytest.raises(BackendFailed, match="it computes in bfloat16, the recipe says float32"):
        in_time(lambda: backend.generate(requests(policy), Sampling(8), 0))


def test_a_server_that_is_back_is_asked_nothing_before_it_holds_the_weights(
    connect: Callable[..., VLLMBackend], tiny_model: Path, engine: FakeEngine, policy: Policy
) -> None:
    """Requests in flight on a server that dies during a sync must not go to one that is being given weights."""
    other = FakeEngine(tiny_model)
    backend = connect(engine, other)
    backend.sync(policy, 0)
    engine.start_again()
    assert versions(backend.generate(requests(policy), Sampling(8), 0)) == {0}  # finds that engine is lost
    assert [s.url for s in backend.pool.live()] == [other.url]
    other.gate.clear()
    flight = backend.submit(requests(policy), Sampling(8), 0)
    load, other_load, loaded = engine.routes["/collective_rpc"], other.routes["/collective_rpc"], threading.Event()

    def loads(body: dict[str, Any]) -> Any:
        answer = other_load(body)
        loaded.set()
        return answer

    def slow(body: dict[str, Any]) -> Any:
        if body["method"] == "grpo_load":
            loaded.wait(5)
            time.sleep(0.1)
            other.die()
            time.sleep(0.2)
        return load(body)

    other.routes["/collective_rpc"], engine.routes["/collective_rpc"] = loads, slow
    engine.asked.clear()
    in_time(lambda: backend.sync(policy, 1))
    completions = in_time(lambda: backend.collect(flight))
    assert versions(completions) == {1}
    early = engine.paths()[: engine.paths().index("/update_weight_version")]
    assert GENERATE not in early
    other.gate.set()
    other.close()


# --- several processes ---


class Exchange:
    """``gather_object`` over threads that stand for processes: each waits for what the others bring."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=10)
        self.brought: dict[int, list[Any]] = {}

    def __call__(self, mine: list[Any]) -> list[Any]:
        rank = int(threading.current_thread().name)
        self.brought[rank] = mine
        self.barrier.wait()
        everything = [value for r in sorted(self.brought) for value in self.brought[r]]
        self.barrier.wait()
        return everything


def on_two_processes(backends: list[VLLMBackend], work: Callable[[VLLMBackend], Any]) -> list[Any]:
    """What each gives, or the error that it raises."""
    outcomes: list[Any] = [None, None]

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(backends[rank])
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return outcomes


@pytest.fixture
def two(
    connect: Callable[..., VLLMBackend], engine: FakeEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> list[VLLMBackend]:
    """Backends of two processes on one engine, the first of which keeps it."""
    backends = [connect(engine), connect(engine)]
    backends[1].rank = backends[1].keeper.rank = 1
    backends[1].keeper.servers = []
    monkeypatch.setattr(backend_module, "gather_object", Exchange(2))
    assert [type(o) for o in on_two_processes(backends, lambda b: b.sync(policy, 0))] == [dict, dict]
    return backends


def test_what_the_keeper_cannot_do_fails_on_every_process(
    two: list[VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    engine.routes["/pause"] = lambda body: (400, "not now")
    outcomes = on_two_processes(two, lambda b: b.sync(policy, 1))
    assert [type(o) for o in outcomes] == [type(outcomes[0])] * 2
    assert all(isinstance(o, RunError) and "refused POST /pause (400): not now" in str(o) for o in outcomes)


def test_a_server_that_does_not_stop_keeps_no_process_in_an_exchange_of_handles(
    two: list[VLLMBackend], engine: FakeEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "handle_of", lambda tensor: {"GPU-0": 0})
    for backend in two:
        backend.keeper.sender = IpcSender(backend.pool, backend_module.gather_object, 5.0)
    engine.routes["/pause"] = lambda body: (400, "not now")
    outcomes = on_two_processes(two, lambda b: b.sync(policy, 1))
    assert all(isinstance(o, RunError) and "refused POST /pause (400): not now" in str(o) for o in outcomes)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", ["refused", "stale"])
def test_what_fails_for_one_processs_requests_fails_on_every_process(
    two: list[VLLMBackend], engine: FakeEngine, policy: Policy, rank: int, fault: str
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if body["sampling_params"]["max_tokens"] != 20:
            return engine.completion(body)
        if fault == "refused":
            return 400, "max_tokens is too large"
        found = engine.completion(body)
        found["choices"][0]["weight_versions"][0]["version"] = "7"
        return found

    engine.routes[GENERATE] = answer
    outcomes = on_two_processes(two, lambda b: b.generate(requests(policy), Sampling(20 if b.rank == rank else 5), 0))
    assert all(isinstance(o, BackendFailed) for o in outcomes), outcomes
    assert str(outcomes[0]) == str(outcomes[1])


def test_a_server_that_one_process_lost_is_looked_at_again_by_its_keeper(
    two: list[VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    engine.start_again()
    engine.settings["model_config"]["dtype"] = "torch.bfloat16"
    outcomes = on_two_processes(two, lambda b: b.generate(requests(policy) if b.rank else [], Sampling(5), 0))
    assert all(isinstance(o, BackendFailed) and "it computes in bfloat16" in str(o) for o in outcomes), outcomes


def test_one_processs_lost_requests_are_asked_again_when_all_are_ready(
    two: list[VLLMBackend], engine: FakeEngine, policy: Policy
) -> None:
    failed = threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        if body["sampling_params"]["max_tokens"] == 6 and not failed.is_set():
            failed.set()
            return 500, "once"
        return engine.completion(body)

    engine.routes[GENERATE] = answer
    outcomes = on_two_processes(two, lambda b: b.generate(requests(policy), Sampling(6 if b.rank else 5), 0))
    assert [versions(o) for o in outcomes] == [{0}, {0}], outcomes
