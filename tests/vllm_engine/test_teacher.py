"""A teacher on a real engine: what it says of texts beside the model itself, and a run that learns from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tiny import build_tokenizer, write_tiny_model
from grpo.backends.vllm.teacher import TeacherServers
from grpo.config import TeacherConfig
from grpo.errors import UserError
from tests.vllm_engine.conftest import TINY, ServerProcess, serve
from tests.vllm_engine.runs import metrics, recipe, train

TEXTS = ["<think> 6 + 3 = 9 , 9 * 3 = 27 ? 27 yes </think> <answer> ( 6 + 3 ) * 3 </answer>", "<think> so 5 + 7 = 12"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    made = serve(TINY, tmp_path_factory.mktemp("teacher"), length=256)
    yield made.wait()
    made.kill()


def texts() -> list[tuple[list[int], list[int]]]:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return [(tokenizer.encode("6 3 3 = 27"), [*tokenizer.encode(text), tokenizer.eos_token_id]) for text in TEXTS]


def test_it_says_of_a_text_what_the_model_does(server: ServerProcess) -> None:
    """At temperature 1, in float32; of the tokens, and of the five likeliest."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    of_tokens = TeacherServers(TeacherConfig(url=server.url)).ask(texts())
    of_top = TeacherServers(TeacherConfig(url=server.url, top_k=5)).ask(texts())
    for (prompt, completion), alone, top in zip(texts(), of_tokens, of_top, strict=True):
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        log_p_TV = logits_TV.log_softmax(-1)
        expected_T = log_p_TV.gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(alone.logprobs), expected_T, atol=1e-4, rtol=1e-4)
        values, ids = log_p_TV.topk(5)
        assert top.top_ids is not None
        torch.testing.assert_close(torch.tensor(top.top_logprobs), values, atol=1e-4, rtol=1e-4)
        assert [sorted(of_token) for of_token in top.top_ids] == [sorted(of_token) for of_token in ids.tolist()]


def test_it_is_looked_at_before_a_run(server: ServerProcess) -> None:
    servers = TeacherServers(TeacherConfig(url=server.url))
    servers.check(build_tokenizer(), 255)
    with pytest.raises(UserError, match="reads 256 tokens at most"):
        servers.check(build_tokenizer(), 256)
    with pytest.raises(UserError, match="is not the student's, so it can't judge the student's tokens: token "):
        servers.check(build_tokenizer(("plums",)), 255)


@pytest.mark.parametrize("top_k", [0, 8])
def test_a_student_comes_nearer_to_it(server: ServerProcess, tmp_path: Path, top_k: int) -> None:
    """Without rewards; its own samples come from the hf backend."""
    write_tiny_model(tmp_path / "student", seed=3, width=64, layers=2)
    path = recipe(
        tmp_path / "run",
        base=tmp_path / "student",
        rollout={"backend": "hf", "num_generations": 8},
        teacher={"url": server.url, "top_k": top_k},
        training={"max_steps": 8},
        rewards=[],
        optimizer={"learning_rate": 5e-3},
    )
    done = train(path)
    assert done.returncode == 0, done.stderr
    kl = [row["teacher/kl"] for row in metrics(tmp_path / "run", of="teacher/kl")]
    assert len(kl) == 8
    assert sum(kl[-2:]) < 0.95 * sum(kl[:2])
