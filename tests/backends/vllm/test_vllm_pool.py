"""The pool against fake servers that die, hang, refuse and come back; and what ``api.py`` makes of HTTP answers."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from grpo.backends.base import Sampling
from grpo.backends.vllm import api, pool
from grpo.backends.vllm.api import Server, ServerGone
from grpo.backends.vllm.completions import generate_payload
from grpo.backends.vllm.pool import Answers, Lost, Pool
from grpo.errors import BackendFailed, RunError
from tests.fake_vllm import GENERATE, FakeServer

REFUSED = {"error": {"message": "max_tokens is too large", "type": "BadRequestError", "code": 400}}


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    made = [FakeServer(), FakeServer()]
    yield made
    for server in made:
        server.gate.set()
        server.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., Pool]]:
    """Pools over fake servers, all up."""
    made: list[Pool] = []

    def connect(*servers: FakeServer, timeout: float = 20.0) -> Pool:
        made.append(Pool([server.url for server in servers], timeout))
        made[-1].up([server.url for server in servers])
        return made[-1]

    yield connect
    for one in made:
        one.close()


def payloads(number: int) -> list[dict[str, Any]]:
    """Requests with the seeds 0, 1, 2, …"""
    return [generate_payload([1, 2], 2 * i, Sampling(8), [0], version=0, model=None) for i in range(number)]


def tokens(answers: list[dict[str, Any] | Lost]) -> list[int]:
    assert not any(isinstance(answer, Lost) for answer in answers), answers
    return [answer["token_ids"][0] for answer in answers]


def with_choice(answer: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return answer | {"choices": [answer["choices"][0] | changed]}


def all_of(flight: Answers) -> list[Any]:
    """The answers in the order of what was asked."""
    found = dict(flight)
    return [found[i] for i in range(len(found))]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


# --- where requests go ---


def test_requests_are_balanced_over_servers_and_answers_come_in_order(servers, connect) -> None:
    a, b = servers
    a.gate.clear(), b.gate.clear()
    flight = connect(a, b).submit(payloads(11))
    wait_for(lambda: a.open + b.open == 11)
    assert {a.open, b.open} == {5, 6}
    assert not flight.asked.done()
    b.gate.set(), wait_for(lambda: b.open == 0), a.gate.set()
    assert tokens(all_of(flight)) == list(range(11))


def test_answers_come_as_they_end(servers, connect) -> None:
    a, b = servers
    a.gate.clear()
    coming = iter(connect(a, b).submit(payloads(6)))
    early = [next(coming) for _ in range(3)]
    assert sorted(tokens([answer for _, answer in early])) == sorted(place for place, _ in early)
    a.gate.set()
    assert sorted(place for place, _ in [*early, *coming]) == list(range(6))


def test_what_is_still_open_counts_for_the_next_requests(servers, connect) -> None:
    a, b = servers
    a.gate.clear()
    one = connect(a, b)
    first = one.submit(payloads(8))
    wait_for(lambda: a.open == 4 and len(b.seeds()) == 4 and b.open == 0)
    all_of(one.submit(payloads(3)))
    assert len(b.seeds()) == 7, "a has four open, b none"
    a.gate.set()
    all_of(first)


def test_a_server_that_dies_has_its_requests_sent_to_the_other(servers, connect, caplog) -> None:
    a, b = servers
    a.gate.clear(), b.gate.clear()
    one = connect(a, b)
    flight = one.submit(payloads(8))
    wait_for(lambda: a.open == b.open == 4)
    of_a = a.seeds()
    with caplog.at_level(logging.WARNING, "grpo"):
        a.die()
        b.gate.set()
        assert tokens(all_of(flight)) == list(range(8))
    assert sorted(b.seeds()) == list(range(8)), "all of them, each once"
    assert set(of_a) < set(b.seeds())
    assert one.live() == [one.servers[1]]
    assert [r.getMessage().partition(":")[0] + " …" for r in caplog.records] == ["vllm server http …"]
    assert f"vllm server {a.url} is lost: POST {GENERATE}: " in caplog.text
    assert f"{a.url}: POST {GENERATE}: " in one.last_error()


def test_a_dead_server_is_asked_nothing_until_it_is_taken_back(servers, connect) -> None:
    a, b = servers
    one = connect(a, b)
    a.die()
    all_of(one.submit(payloads(4)))
    a.start()
    all_of(one.submit(payloads(4)))
    assert a.seeds() == []
    one.up([a.url, b.url])
    all_of(one.submit(payloads(4)))
    assert len(a.seeds()) == 2


def test_with_both_gone_the_requests_are_lost_with_each_servers_last_error(servers, connect) -> None:
    a, b = servers
    a.gate.clear()
    b.routes[GENERATE] = lambda body: (503, {"error": {"message": "EngineCore died"}})
    one = connect(a, b)
    flight = one.submit(payloads(6))
    wait_for(lambda: a.open == 6)
    a.die()
    lost = all_of(flight)
    assert all(isinstance(answer, Lost) for answer in lost)
    assert f"{b.url}: POST {GENERATE} answered 503: EngineCore died" in lost[-1].why
    assert f"{a.url}: POST {GENERATE}: " in lost[-1].why
    assert one.live() == []
    assert isinstance(all_of(one.submit(payloads(1)))[0], Lost), "and nobody is asked again"
    assert len(a.seeds()) == 6


def test_what_was_answered_before_all_servers_went_is_kept(servers, connect) -> None:
    a, _ = servers
    one = connect(a)
    a.routes[GENERATE] = lambda body: a.completion(body) if body["sampling_params"]["seed"] < 3 else (500, "gone")
    found = all_of(one.submit(payloads(6)))
    assert tokens(found[:3]) == [0, 1, 2]
    assert [isinstance(answer, Lost) for answer in found] == [False] * 3 + [True] * 3


def test_a_server_with_weights_of_nobody_was_started_again(servers, connect) -> None:
    """Its completions are good HTTP answers; only their label gives it away."""
    a, b = servers
    a.label = "default"
    one = connect(a, b)
    assert tokens(all_of(one.submit(payloads(6)))) == list(range(6))
    assert sorted(b.seeds()) == list(range(6))
    assert one.down == {a.url: "it was started again and holds weights that did not come from this run"}


def test_one_token_of_nobodys_weights_is_enough(servers, connect) -> None:
    a, _ = servers
    spans = [{"start": 0, "end": 1, "version": "3"}, {"start": 1, "end": 2, "version": "default"}]
    a.routes[GENERATE] = lambda body: with_choice(a.completion(body), weight_versions=spans)
    assert "started again" in all_of(connect(a).submit(payloads(1)))[0].why


def test_a_refusal_is_an_error_with_the_servers_message_and_ends_the_other_requests(servers, connect) -> None:
    a, b = servers
    a.gate.clear()
    b.routes[GENERATE] = lambda body: (400, REFUSED)
    one = connect(a, b)
    flight = one.submit(payloads(4))
    with pytest.raises(BackendFailed) as refused:
        all_of(flight)
    assert str(refused.value) == f"vllm server {b.url} refused POST {GENERATE} (400): max_tokens is too large"
    wait_for(lambda: a.open == 0)
    assert one.live() == one.servers, "a server that refuses is not lost"


def test_no_more_than_so_many_requests_are_open_on_a_server(servers, connect, monkeypatch) -> None:
    a, b = servers
    monkeypatch.setattr(pool, "MAX_IN_FLIGHT", 3)
    a.gate.clear(), b.gate.clear()
    flight = connect(a, b).submit(payloads(20))
    wait_for(lambda: a.open == b.open == 3)
    time.sleep(0.05)
    assert (a.open, b.open) == (3, 3)
    a.gate.set(), b.gate.set()
    assert tokens(all_of(flight)) == list(range(20))
    assert (a.most_open, b.most_open) == (3, 3)


def test_a_connection_serves_one_request_after_the_other(servers, connect, monkeypatch) -> None:
    a, _ = servers
    monkeypatch.setattr(pool, "MAX_IN_FLIGHT", 3)
    assert tokens(all_of(connect(a).submit(payloads(30)))) == list(range(30))
    assert len(a.connections) <= 3


def test_a_connection_that_waited_too_long_is_not_used_again(servers, connect, monkeypatch) -> None:
    """The server may be closing it just then."""
    a, _ = servers
    monkeypatch.setattr(pool, "IDLE", 0.02)
    one = connect(a)
    for _ in range(3):
        all_of(one.submit(payloads(1)))
        time.sleep(0.05)
    assert len(a.connections) == 3


def test_a_server_started_again_is_not_asked_over_its_old_connections(servers, connect) -> None:
    a, _ = servers
    one = connect(a)
    all_of(one.submit(payloads(4)))
    a.die(), a.start()
    assert tokens(all_of(one.submit(payloads(4)))) == [0, 1, 2, 3]


def test_a_server_is_reached_over_a_unix_socket(connect, tmp_path) -> None:
    server = FakeServer(at=tmp_path / "s")
    one = connect(server)
    assert tokens(all_of(one.submit(payloads(5)))) == list(range(5))
    server.die()
    with pytest.raises(ServerGone, match=r"^GET /health: .*[Cc]onnect"):
        ask(one, "check_health")
    assert one.servers[0].url == f"unix:{tmp_path}/s"
    server.close()


def test_requests_that_wait_for_a_dead_server_are_not_sent_to_it(servers, connect, monkeypatch) -> None:
    a, b = servers
    monkeypatch.setattr(pool, "MAX_IN_FLIGHT", 2)
    a.gate.clear(), b.gate.clear()
    one = connect(a, b)
    flight = one.submit(payloads(12))
    wait_for(lambda: a.open == b.open == 2)
    a.die(), a.start()
    wait_for(lambda: one.live() == [one.servers[1]])
    b.gate.set()
    assert tokens(all_of(flight)) == list(range(12))
    assert len(a.seeds()) == 2
    assert b.most_open == 2


def test_a_server_that_hangs_is_lost_after_its_seconds(servers, connect) -> None:
    a, _ = servers
    a.gate.clear()
    one = connect(a, timeout=0.2)
    started = time.monotonic()
    lost = all_of(one.submit(payloads(2)))
    assert 0.2 < time.monotonic() - started < 5
    assert [answer.why for answer in lost] == [f"{a.url}: no answer to POST {GENERATE} within 0.2 s"] * 2


def test_waiting_for_a_free_place_does_not_count_as_hanging(servers, connect, monkeypatch) -> None:
    a, _ = servers
    monkeypatch.setattr(pool, "MAX_IN_FLIGHT", 1)
    a.routes[GENERATE] = lambda body: time.sleep(0.05) or a.completion(body)
    assert tokens(all_of(connect(a, timeout=0.3).submit(payloads(10)))) == list(range(10))


@pytest.mark.parametrize("working", [False, True])
def test_closing_leaves_nothing_open(servers, caplog, recwarn, monkeypatch, working: bool) -> None:
    """Neither tasks nor connections, with requests under way, waiting for a place, or none."""
    a, b = servers
    monkeypatch.setattr(pool, "MAX_IN_FLIGHT", 2)
    if working:
        a.gate.clear(), b.gate.clear()
    one = Pool([a.url, b.url], 20.0)
    one.up([a.url, b.url])
    flight = one.submit(payloads(10))
    wait_for(lambda: a.open == b.open == 2) if working else all_of(flight)
    one.close()
    assert flight.asked.cancelled() is working
    assert not one.thread.is_alive()
    wait_for(lambda: a.open == b.open == 0)
    del one, flight
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
    assert [str(w.message) for w in recwarn if issubclass(w.category, ResourceWarning)] == []


def test_requests_go_on_while_the_caller_does_something_else(servers, connect) -> None:
    a, _ = servers
    flight = connect(a).submit(payloads(5))
    wait_for(flight.asked.done)
    assert tokens(all_of(flight)) == list(range(5))


# --- what an answer means ---


def ask(one: Pool, method: str, *args: Any, **options: Any) -> Any:
    return one.run(getattr(one.servers[0], method)(*args, **options))


def test_an_adapter_that_a_server_lacks_means_that_it_was_started_again(servers, connect) -> None:
    a, _ = servers
    a.routes[GENERATE] = lambda body: (404, {"error": {"message": "The model `grpo-3` does not exist."}})
    named = generate_payload([1], 0, Sampling(8), [0], version=3, model="grpo-3")
    one = connect(a)
    with pytest.raises(ServerGone, match=rf"POST {GENERATE} answered 404: The model `grpo-3` does not exist"):
        ask(one, "generate", named, 5)
    with pytest.raises(RunError, match=r"refused POST .*\(404\).*Start the server with launch/vllm_serve.sh"):
        ask(one, "generate", payloads(1)[0], 5)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((400, {"error": {"message": "too long", "code": 400}}), "(400): too long"),
        ((422, {"detail": "field required"}), "(422): field required"),
        ((422, {"error": "mode is unknown"}), "(422): mode is unknown"),
        ((400, "plain words\n"), "(400): plain words"),
        ((400, ""), "(400): no message"),
        ((400, "x" * 9000), "(400): " + "x" * 500),
        ((404, {"detail": "Not Found"}),
         "(404): Not Found. Start the server with launch/vllm_serve.sh, which opens the routes that training needs"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_the_server_said(servers, connect, answer: Any, said: str) -> None:
    a, _ = servers
    a.routes["/pause"] = lambda body: answer
    with pytest.raises(RunError) as refused:
        ask(connect(a), "pause", 5)
    assert str(refused.value) == f"vllm server {a.url} refused POST /pause {said}"


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_fails_may_come_back(servers, connect, status: int) -> None:
    a, _ = servers
    a.routes["/collective_rpc"] = lambda body: (status, {"error": {"message": "EngineDeadError"}})
    with pytest.raises(ServerGone, match=rf"^POST /collective_rpc answered {status}: EngineDeadError$"):
        ask(connect(a), "load", "/dev/shm/x", timeout=5)


def test_a_request_that_the_engine_gave_up_may_be_sent_again(servers, connect) -> None:
    a, _ = servers
    a.routes[GENERATE] = lambda body: with_choice(a.completion(body), finish_reason="abort")
    with pytest.raises(ServerGone, match="a request ended with 'abort'"):
        ask(connect(a), "generate", payloads(1)[0], 5)


def test_a_deadline_names_route_and_seconds(servers, connect) -> None:
    a, _ = servers
    a.routes["/sleep"] = lambda body: time.sleep(0.4) or {}
    with pytest.raises(ServerGone, match=r"^no answer to POST /sleep within 0\.1 s$"):
        ask(connect(a), "sleep", 2, 0.1)


def test_a_server_that_nobody_started_may_come_up(servers, connect) -> None:
    a, _ = servers
    a.die()
    with pytest.raises(ServerGone, match=r"^GET /health: .*[Cc]onnect"):
        ask(connect(a), "check_health")


def test_a_prefix_cache_that_was_not_dropped_is_an_error(servers, connect) -> None:
    a, _ = servers
    a.routes["/reset_prefix_cache"] = lambda body: {"success": False}
    with pytest.raises(RunError, match="did not reset its prefix cache: old keys and values would be used"):
        ask(connect(a), "forget_prefixes")
    a.routes["/reset_prefix_cache"] = lambda body: {"success": True}
    ask(connect(a), "forget_prefixes")


def test_an_answer_that_breaks_off_in_the_middle_may_come_again() -> None:
    """Headers and half a body, then the connection ends: what a killed server leaves."""

    async def scene() -> None:
        async def half(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"choices": [')
            request.transport.abort()
            return response

        app = web.Application()
        app.router.add_post(GENERATE, half)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with aiohttp.ClientSession() as session:
            server = Server(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", session)
            with pytest.raises(ServerGone, match=rf"^POST {GENERATE}: "):
                await server.generate(payloads(1)[0], 5)
        await runner.cleanup()

    asyncio.run(scene())


def test_a_request_asks_for_the_trainers_distribution_and_no_other() -> None:
    sampling = Sampling(40, temperature=0.7, top_p=0.9, top_k=50, min_p=0.05, stop=["</answer>"])
    payload = generate_payload([5, 6], (1 << 64) - 1, sampling, [1, 2], version=12, model="grpo-12")
    assert payload["token_ids"] == [5, 6]
    assert payload["model"] == "grpo-12"
    assert payload["cache_salt"] == "v12"
    asked = payload["sampling_params"]
    assert asked["seed"] == (1 << 63) - 1, "the largest that vLLM takes"
    assert (asked["max_tokens"], asked["temperature"], asked["stop_token_ids"]) == (40, 0.7, [1, 2])
    assert (asked["top_p"], asked["top_k"], asked["min_p"]) == (0.9, 50, 0.05)
    assert (asked["stop"], asked["include_stop_str_in_output"], asked["detokenize"]) == (["</answer>"], True, True)
    assert (asked["ignore_eos"], asked["logprobs"]) == (True, 0)
    plain = generate_payload([5, 6], 0, Sampling(40), [1], version=12, model=None)
    assert "model" not in plain
    assert (plain["sampling_params"]["min_p"], plain["sampling_params"]["detokenize"]) == (0.0, False)


def test_the_table_of_routes_names_those_that_are_called() -> None:
    called = set(re.findall(r'"(/[\w/]+)', inspect.getsource(Server)))
    assert len(called) > 15
    ends = (api.__doc__ or "").replace("/start_, /update_,", "/start_weight_update, /update_weights,")
    assert {path for path in called if path not in ends} == set()
