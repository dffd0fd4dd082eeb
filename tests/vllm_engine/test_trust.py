"""One real server: what it samples, whose weights it holds, and what the checks after a sync find."""

from __future__ import annotations

import base64
import dataclasses
import json
import pickle
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.backends.base import Request, Sampling
from grpo.backends.vllm import backend as backend_module
from grpo.backends.vllm import keeper as keeper_module
from grpo.backends.vllm import transfer
from grpo.backends.vllm.api import Server, ServerGone
from grpo.backends.vllm.backend import VLLMBackend
from grpo.backends.vllm.transfer import IpcSender
from grpo.errors import BackendFailed, RunError, UserError
from grpo.model.policy import Policy
from grpo.randomness import key
from grpo.types import Completion, Prompt, Status
from tests.conftest import make_policy, make_recipe
from tests.vllm_engine.conftest import TINY, ServerProcess, serve

QUESTIONS = ["6 3 9 = 27", "1 2 3 = 6", "8 8 8 = 24"]


def prompts(policy: Policy) -> list[Prompt]:
    return [Prompt(i, q, q, policy.tokenizer.encode(q, add_special_tokens=False)) for i, q in enumerate(QUESTIONS)]


def requests(policy: Policy, G: int = 4) -> list[Request]:
    return [Request(p, [key(0, p.id, g) for g in range(G)]) for p in prompts(policy)]


def tokens(completions: list[list[Completion]]) -> list[list[int]]:
    return [c.token_ids for group in completions for c in group]


def teacher_forced(policy: Policy, prompt: Prompt, token_ids: list[int], temperature: float) -> torch.Tensor:
    ids = torch.tensor([prompt.token_ids + token_ids])
    policy.causal_lm.eval()
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1] / temperature
    return logits.float().log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def connect(policy: Policy, server: ServerProcess, **sections: Any) -> VLLMBackend:
    rollout = {"backend": "vllm", "vllm_mode": "server", "vllm_server_base_url": server.url}
    sections["rollout"] = rollout | {"vllm_server_timeout": 30.0} | sections.get("rollout", {})
    sections["data"] = {"name": "countdown", "max_prompt_length": 64} | sections.get("data", {})
    sections["rollout"].setdefault("max_completion_length", 200)
    return VLLMBackend(policy, make_recipe(TINY, **sections))


@pytest.fixture
def policy() -> Policy:
    return make_policy(TINY)


@pytest.fixture
def backend(policy: Policy, tiny_server: ServerProcess) -> Iterator[VLLMBackend]:
    connected = connect(policy, tiny_server)
    connected.sync(policy, 0)
    yield connected
    connected.close()


def shift(policy: Policy, amount: float = 0.02) -> None:
    """Another policy: every weight moves a little."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.causal_lm.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logprobs_are_the_teacher_forced_ones(backend: VLLMBackend, policy: Policy, temperature: float) -> None:
    completions = backend.generate(requests(policy), Sampling(60, temperature), 0)
    for prompt, group in zip(prompts(policy), completions, strict=True):
        for completion in group:
            expected = teacher_forced(policy, prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.sampler_logprobs), expected, atol=1e-4, rtol=0)
            assert [dataclasses.astuple(span) for span in completion.versions] == [(0, len(completion.token_ids), 0)]


def test_completions_end_as_those_of_the_hf_backend_do(backend: VLLMBackend, policy: Policy) -> None:
    end = policy.stop_token_ids[0]
    completions = [c for group in backend.generate(requests(policy, 16), Sampling(40), 0) for c in group]
    assert {c.status for c in completions} == {Status.STOP, Status.LENGTH}
    for completion in completions:
        assert (completion.token_ids[-1] == end) == (completion.status is Status.STOP)
        assert completion.token_ids.count(end) == (completion.status is Status.STOP)
        assert len(completion.token_ids) == 40 or completion.status is Status.STOP
        assert completion.text == policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_stop_strings_stay_in_the_completion(backend: VLLMBackend, policy: Policy) -> None:
    completions = [c for group in backend.generate(requests(policy), Sampling(60, stop=["="]), 0) for c in group]
    stopped = [c for c in completions if c.status is Status.STOP and "=" in c.text]
    assert len(stopped) > len(completions) // 2
    assert all(c.text.endswith("=") and c.text.count("=") == 1 for c in stopped)


def test_a_tag_that_is_a_special_token_reaches_the_text_and_stops_the_completion(tmp_path: Path) -> None:
    tokenizer = make_policy(TINY).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["="]})
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    tokenizer.save_pretrained(model)
    policy = make_policy(model)
    assert "=" in policy.tokenizer.all_special_tokens
    server = serve(model, tmp_path, '--weight-transfer-config={"backend": "ipc"}').wait()
    backend = connect(policy, server)
    try:
        backend.sync(policy, 0)
        free = [c for group in backend.generate(requests(policy), Sampling(60), 0) for c in group]
        tag = policy.tokenizer.convert_tokens_to_ids("=")
        assert sum(c.token_ids.count(tag) for c in free) > 0
        assert all(c.text.count("=") == c.token_ids.count(tag) for c in free)
        ended = [c for group in backend.generate(requests(policy), Sampling(60, stop=["="]), 0) for c in group]
        found = [c for c in ended if tag in c.token_ids]
        assert found
        assert all(c.token_ids.index(tag) == len(c.token_ids) - 1 and c.status is Status.STOP for c in found)
    finally:
        backend.close()
        server.kill()


def test_a_key_is_a_completion(backend: VLLMBackend, policy: Policy) -> None:
    one = backend.generate(requests(policy), Sampling(60), 0)
    assert tokens(backend.generate(requests(policy), Sampling(60), 0)) == tokens(one)
    others = [Request(r.prompt, [k + 2 for k in r.keys]) for r in requests(policy)]
    assert tokens(backend.generate(others, Sampling(60), 0)) != tokens(one)


def test_greedy_has_logprob_zero_as_with_hf(backend: VLLMBackend, policy: Policy) -> None:
    group = backend.generate(requests(policy, 2), Sampling(20, temperature=0), 0)[0]
    assert group[0].token_ids == group[1].token_ids
    assert set(group[0].sampler_logprobs) == {0.0}


def test_a_sync_changes_what_is_sampled_and_going_back_brings_it_back(backend: VLLMBackend, policy: Policy) -> None:
    before = {name: tensor.clone() for name, tensor in policy.causal_lm.state_dict().items()}
    first = backend.generate(requests(policy), Sampling(60), 0)
    shift(policy)
    metrics = backend.sync(policy, 1)
    assert 0 < metrics["sampling/probe_logp_difference/mean"] < 1e-4
    second = backend.generate(requests(policy), Sampling(60), 1)
    assert tokens(second) != tokens(first)
    for prompt, group in zip(prompts(policy), second, strict=True):  # the prompt's cached keys and values are new too
        for completion in group:
            expected = teacher_forced(policy, prompt, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.sampler_logprobs), expected, atol=1e-4, rtol=0)
    policy.causal_lm.load_state_dict(before)
    backend.sync(policy, 2)
    assert tokens(backend.generate(requests(policy), Sampling(60), 2)) == tokens(first)


def test_another_version_than_held_is_refused(backend: VLLMBackend, policy: Policy) -> None:
    with pytest.raises(RunError, match=r"asked for policy version 3, the vllm backend holds 0"):
        backend.generate(requests(policy), Sampling(8), 3)


def test_a_stale_engine_is_caught(backend: VLLMBackend, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says it loaded the weights, and did not."""
    monkeypatch.setattr(backend.keeper.sender, "send", lambda *_: {})
    shift(policy, 1e-6)  # a small step of learning, far below what the probe's noise would hide
    with pytest.raises(
        BackendFailed, match=r"does not hold the policy's weights of version 1: 27 of 27 parameters differ"
    ):
        backend.sync(policy, 1)


def test_one_perturbed_tensor_is_caught_by_name_on_the_way(
    backend: VLLMBackend, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = backend.keeper.sender.send

    def perturbed(servers: Any, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
        name = "model.layers.2.self_attn.k_proj.weight"
        changed = state[name].clone()
        changed[3, 5] += 1e-4
        return send(servers, state | {name: changed}, dtype)

    monkeypatch.setattr(backend.keeper.sender, "send", perturbed)
    with pytest.raises(
        BackendFailed, match=r"1 of 27 parameters differ .*: model\.layers\.2\.self_attn\.qkv_proj\.weight\."
    ):
        backend.sync(policy, 1)


def test_one_perturbed_tensor_is_caught_by_name_in_memory(
    backend: VLLMBackend, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right when it was loaded, changed since (what waking up from sleep has done)."""
    send, pool = backend.keeper.sender.send, backend.pool

    def then_perturb(servers: Any, state: Any, dtype: torch.dtype) -> Any:
        failed = send(servers, state, dtype)
        for server in servers:
            name = "model.layers.1.input_layernorm.weight"
            pool.run(server.on_workers("perturb", name, "1.001", timeout=20))
        return failed

    monkeypatch.setattr(backend.keeper.sender, "send", then_perturb)
    with pytest.raises(
        BackendFailed, match=r"1 of 27 parameters differ .*: model\.layers\.1\.input_layernorm\.weight\."
    ):
        backend.sync(policy, 1)


# --- sleep, and transfers that break off ---


def is_right(backend: VLLMBackend, policy: Policy, version: int) -> bool:
    """The engine samples from the policy; the checks after a sync compare weights, this the distribution."""
    completions = backend.generate(requests(policy), Sampling(30), version)
    for prompt, group in zip(prompts(policy), completions, strict=True):
        for completion in group:
            expected = teacher_forced(policy, prompt, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.sampler_logprobs), expected, atol=1e-4, rtol=0)
    return True


def asleep(server: ServerProcess) -> bool:
    return json.load(urllib.request.urlopen(f"{server.url}/is_sleeping", timeout=10))["is_sleeping"]


def test_an_engine_that_slept_without_its_weights_samples_from_those_of_the_next_sync(
    backend: VLLMBackend, policy: Policy, tiny_server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU vLLM gives up no memory, so the test spoils the weights. The states of its scheduler are real."""
    backend.sleeps = True
    (server,) = backend.keeper.servers
    compare = backend.keeper._check_weights
    at_comparison: list[bool] = []

    def watched(*arguments: Any) -> None:
        at_comparison.append(asleep(tiny_server))
        compare(*arguments)

    monkeypatch.setattr(backend.keeper, "_check_weights", watched)
    for version in (1, 2):
        backend.rest()
        backend.rest()
        assert asleep(tiny_server)
        backend.pool.run(server.on_workers("lose_weights", timeout=20))
        shift(policy)
        backend.sync(policy, version)
        assert not asleep(tiny_server)
        assert is_right(backend, policy, version)
    assert at_comparison == [True, True], "keys and values take their memory last"
    backend.rest()
    backend.pool.run(server.on_workers("lose_weights", timeout=20))
    assert is_right(backend, policy, 2), "who is asked in its sleep gets the weights first"


def test_a_file_that_breaks_off_half_way_is_followed_by_a_right_one(
    backend: VLLMBackend, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine had taken two thirds of a layer's fused tensor. It must not wait there for what comes next."""
    write, broken = transfer._write, []
    (server,) = backend.keeper.servers

    def half(state: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
        names = list(state)
        cut = len(names) if broken else names.index("model.layers.1.self_attn.k_proj.weight") + 1
        write({name: state[name] for name in names[:cut]}, dtype, folder)
        if not broken:
            (folder / "more.safetensors").write_bytes(b"the disk was full")
            broken.append(folder)
        else:
            assert backend.pool.run(server.on_workers("half_loaded", timeout=20)) == [[]]

    monkeypatch.setattr(transfer, "_write", half)
    shift(policy)
    backend.sync(policy, 1)
    assert broken
    assert is_right(backend, policy, 1)


def bytes_of(tensor: torch.Tensor) -> dict[str, Any]:
    """NOT CUDA IPC: in place of ``handle_of``, for ``perturbing_worker.IpcOfBytes``."""
    return {"bytes": pickle.dumps(tensor.numpy())}


@pytest.mark.parametrize("where", ["trainer", "engine"])
def test_an_update_that_breaks_off_is_ended_and_followed_by_a_right_one(
    backend: VLLMBackend, policy: Policy, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Between the start and the end of an update, in the trainer or while the engine loads a chunk."""
    monkeypatch.setattr(transfer, "handle_of", bytes_of)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 100_000)
    update, updates = transfer._update, []

    async def breaks(server: Server, info: dict[str, Any], timeout: float) -> None:
        updates.append(info["names"])
        if len(updates) == 5:
            if where == "trainer":
                raise ServerGone("the network was gone")
            info = info | {"ipc_handles_pickled": base64.b64encode(pickle.dumps([{}] * len(info["names"]))).decode()}
        await update(server, info, timeout)

    monkeypatch.setattr(transfer, "_update", breaks)
    sender = backend.keeper.sender = IpcSender(backend.pool, lambda value: [value], 20.0)
    shift(policy)
    backend.sync(policy, 1)
    assert len(updates) > 10
    assert not sender.unfinished
    assert is_right(backend, policy, 1)


def test_a_wrong_temperature_is_caught_and_named(
    backend: VLLMBackend, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = keeper_module.generate_payload

    def cooler(*arguments: Any, **options: Any) -> dict[str, Any]:
        payload = make(*arguments, **options)
        payload["sampling_params"]["temperature"] = 0.7
        return payload

    monkeypatch.setattr(keeper_module, "generate_payload", cooler)
    with pytest.raises(
        BackendFailed, match=r"tolerance 0\.001.* They are those of temperature 0\.7; the recipe's is 1"
    ):
        backend.sync(policy, 1)


def test_settings_that_do_not_fit_are_refused_by_name(policy: Policy, tiny_server: ServerProcess) -> None:
    backend = connect(policy, tiny_server, rollout={"max_completion_length": 1024, "vllm_dtype": "bfloat16"})
    with pytest.raises(UserError) as refused:
        backend.sync(policy, 0)
    backend.close()
    text = str(refused.value)
    assert "it computes in float32, the recipe says bfloat16" in text
    assert "its --max-model-len is 512; data.max_prompt_length and the longest completion together are 1088" in text
    assert text.count(tiny_server.url) == 2


def test_completions_in_flight_go_on_under_new_weights_and_say_so(backend: VLLMBackend, policy: Policy) -> None:
    """What was sampled before the sync is by the old policy, what came after by the new; both logprobs are right."""
    end = policy.stop_token_ids
    policy.stop_token_ids = [len(policy.tokenizer) - 1]  # which nobody samples: completions of full length
    crossed: list[tuple[Prompt, Completion]] = []
    for delay in (0.1, 0.2, 0.4, 0.8):  # how fast the engine is depends on the machine
        old = {name: tensor.clone() for name, tensor in policy.causal_lm.state_dict().items()}
        version = backend.version
        flight = backend.submit(requests(policy, 16), Sampling(190), version)
        time.sleep(delay)
        shift(policy, 0.005)
        backend.sync(policy, version + 1)
        completions = backend.collect(flight)
        crossed = [(p, c) for p, g in zip(prompts(policy), completions, strict=True) for c in g if len(c.versions) == 2]
        if crossed:
            break
    policy.stop_token_ids = end
    assert crossed, "no completion was in flight when the weights came"
    new = {name: tensor.clone() for name, tensor in policy.causal_lm.state_dict().items()}
    for prompt, completion in crossed[:4]:
        first, second = completion.versions
        assert (first.start, first.version, second.version, second.end) == (
            0,
            version,
            version + 1,
            len(completion.token_ids),
        )
        assert first.end == second.start
        for span, weights in ((first, old), (second, new)):
            policy.causal_lm.load_state_dict(weights)
            expected = teacher_forced(policy, prompt, completion.token_ids, 1.0)[span.start : span.end]
            given = torch.tensor(completion.sampler_logprobs[span.start : span.end])
            torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)


def test_a_server_that_nobody_started_is_named_with_its_budget(policy: Policy) -> None:
    nowhere = ServerProcess(TINY, [], Path("/nonexistent"))
    backend = connect(policy, nowhere, rollout={"vllm_server_timeout": 1.0})
    with pytest.raises(
        BackendFailed, match=rf"rank 0, step 0: vllm server {nowhere.url} did not answer within .*\(1 s\)"
    ):
        backend.sync(policy, 0)
    backend.close()
    assert backend_module.RECOVERIES > 1
