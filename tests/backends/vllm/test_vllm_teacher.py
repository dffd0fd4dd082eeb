"""A teacher on servers, here such as are not vLLM: what is asked, what is made of the answers, what is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from data.tiny import build_tokenizer
from grpo.backends.vllm import teacher as module
from grpo.backends.vllm.teacher import TeacherServers
from grpo.config import TeacherConfig
from grpo.errors import BackendFailed, UserError
from tests.fake_vllm import Answer, Body, FakeServer

TOKENIZER = build_tokenizer()
COMPLETIONS = "/v1/completions"


def logprob(token: int) -> float:
    return -0.1 * (token % 7 + 1)


class Teacher(FakeServer):
    """Says ``logprob`` of each token, and that tokens 1, 2, ... are the likeliest; reads ids as the tiny tokenizer."""

    def __init__(self, root: str = "a/teacher", limit: int = 64):
        super().__init__()
        models = {"data": [{"id": "served", "root": root, "max_model_len": limit}]}
        self.routes |= {"/v1/models": lambda _: models, "/detokenize": self.text, COMPLETIONS: self.scored}

    def text(self, body: Body) -> Answer:
        return {"prompt": TOKENIZER.decode(body["tokens"], clean_up_tokenization_spaces=False)}

    def scored(self, body: Body) -> Answer:
        def entry(token: int) -> dict[str, Any]:
            known = {str(i): {"rank": i, "logprob": -float(i)} for i in range(1, body["prompt_logprobs"] + 1)}
            own = known.get(str(token), {"rank": 90, "logprob": logprob(token)})
            return {str(token): own} | known  # the text's own comes first, as vLLM has it

        return {"choices": [{"prompt_logprobs": [None, *map(entry, body["prompt"][1:])]}]}

    def texts(self) -> list[list[int]]:
        return [body["prompt"] for path, body in self.asked if path == COMPLETIONS]


@pytest.fixture
def server() -> Iterator[Teacher]:
    made = Teacher()
    yield made
    made.close()


@pytest.fixture
def other() -> Iterator[Teacher]:
    made = Teacher()
    yield made
    made.close()


def servers(*made: FakeServer, **config: Any) -> TeacherServers:
    return TeacherServers(TeacherConfig(url=[server.url for server in made], **config))


def test_of_every_text_it_says_the_log_probabilities_of_the_completion(server: Teacher) -> None:
    texts = [([5, 6], [7, 8, 1]), ([9], [10]), ([9], [])]
    found = servers(server).ask(texts)
    assert [list(says.logprobs) for says in found] == [[logprob(7), logprob(8), logprob(1)], [logprob(10)], []]
    assert sorted(server.texts()) == [[5, 6, 7, 8, 1], [9, 10]]
    body = next(body for path, body in server.asked if path == COMPLETIONS)
    assert (body["model"], body["prompt_logprobs"], body["max_tokens"]) == ("served", 0, 1)
    assert servers(server).ask([]) == []


def test_its_likeliest_tokens_are_those_by_rank_whatever_the_text_s_own(server: Teacher) -> None:
    (says,) = servers(server, top_k=2).ask([([5], [1, 30])])
    assert says.top_ids == [[1, 2], [1, 2]]
    assert says.top_logprobs == [[-1.0, -2.0], [-1.0, -2.0]]


def test_texts_go_to_all_servers_and_those_of_a_lost_one_to_the_others(server: Teacher, other: Teacher) -> None:
    texts = [([5, i], [7]) for i in range(200)]
    servers(server, other).ask(texts)
    assert min(len(server.texts()), len(other.texts())) > 20
    other.routes[COMPLETIONS] = lambda _: (503, "gone")
    found = servers(server, other).ask(texts)
    assert [list(says.logprobs) for says in found] == [[logprob(7)]] * 200


def test_a_server_that_comes_back_is_asked_again(server: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.01)
    answers = iter([(503, "starting"), (503, "starting")])
    server.routes[COMPLETIONS] = lambda body: next(answers, None) or server.scored(body)
    assert list(servers(server).ask([([5], [7])])[0].logprobs) == [logprob(7)]


def test_where_none_comes_back_it_says_so(server: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.01)
    server.die()
    with pytest.raises(BackendFailed, match=r"teacher\.url: no server came back in 0\.05 s"):
        servers(server, timeout=0.05).ask([([5], [7])])
    server.start()
    server.routes[COMPLETIONS] = lambda _: (500, "it dies of this")
    with pytest.raises(BackendFailed, match=r"a text of 2 tokens was not judged in 5 attempts; .* it dies of this"):
        servers(server).ask([([5], [7])])


@pytest.mark.parametrize("wrong", [None, -9999.0, math.inf])
def test_what_is_no_log_probability_ends_the_run(server: Teacher, wrong: float | None) -> None:
    server.routes[COMPLETIONS] = lambda _: {
        "choices": [{"prompt_logprobs": [None, {"7": {"rank": 1, "logprob": wrong if wrong != math.inf else None}}]}]
    }
    with pytest.raises(BackendFailed, match="it computes wrongly"):
        servers(server).ask([([5], [7])])


def test_a_server_that_fits_is_taken(server: Teacher, other: Teacher) -> None:
    servers(server, other).check(TOKENIZER, 63)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(server: Teacher, other: Teacher) -> None:
    with pytest.raises(UserError, match=r"reads 64 tokens at most, .* start it with --max-model-len=65"):
        servers(server).check(TOKENIZER, 64)
    third = Teacher(root="another")
    with pytest.raises(UserError, match="the servers hold different models"):
        servers(server, third).check(TOKENIZER, 63)
    third.close()
    with pytest.raises(UserError, match="cannot be reached"):
        servers(third).check(TOKENIZER, 63)
    server.routes[COMPLETIONS] = lambda _: (400, {"error": {"message": "greater than max allowed: 20"}})
    with pytest.raises(UserError, match=r"teacher\.url: .* refused .*greater than max allowed: 20"):
        servers(server, top_k=30).check(TOKENIZER, 63)


def test_the_first_token_that_means_something_else_is_named(server: Teacher) -> None:
    ids = TOKENIZER.convert_tokens_to_ids(["so", "then"])
    swapped = {ids[0]: ids[1], ids[1]: ids[0]}

    def text(body: Body) -> Answer:
        return {"prompt": TOKENIZER.decode([swapped.get(i, i) for i in body["tokens"]])}

    server.routes["/detokenize"] = text
    with pytest.raises(UserError, match=rf"token {min(ids)} is 'so' of the student and 'then' of the teacher"):
        servers(server).check(TOKENIZER, 63)
    server.routes["/detokenize"] = lambda body: (400, "no such id") if max(body["tokens"]) > 50 else server.text(body)
    with pytest.raises((UserError, BackendFailed), match=r"token 51|no such id"):
        servers(server).check(TOKENIZER, 63)
