"""Random and mutated completions through every verifier: no exception, no call over its time limit.

``make fuzz`` gives each verifier 100,000 of them; ``make test`` a few hundred.
"""

from __future__ import annotations

import json
import math as math_
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards import code, cosine, countdown, gsm8k, language, math, overlong, repetition, similarity
from rewards import format as format_
from tests.rewards import attacks

EXAMPLES = int(os.environ.get("GRPO_FUZZ_EXAMPLES", "200"))
SECONDS = 0.3  # wall time of a program
SLACK = {"math": 3.0 + 5.0, "code": SECONDS + 1.0}  # wall time of what has workers; one that starts again takes seconds
CPU_SECONDS = 0.5  # what a verifier without workers may take of the processor; its wall time is the machine's matter

ROWS = {
    "answer": "#### 72",
    "nums": [6, 3, 9],
    "target": 27,
    "tests": json.dumps({"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 3]}),
}
LENGTHS = {"max_completion_length": 64}
REWARDS: dict[str, tuple[Any, dict[str, Any]]] = {  # the function and its arguments
    "countdown": (countdown.countdown_reward, {}),
    "gsm8k": (gsm8k.gsm8k_reward, {}),
    "format": (format_.format_reward, {}),
    "graded format": (format_.format_reward, {"graded": True}),
    "math": (math.math_reward, {"timeout": 3.0, "plain_number": True}),
    "code": (code.code_reward, {"timeout": SECONDS}),
    "overlong": (overlong.overlong_reward, {**LENGTHS, "soft_punish_cache": 16}),
    "cosine": (cosine.cosine_reward, {**LENGTHS, "verifier": "countdown"}),
    "repetition": (repetition.repetition_reward, {"ngram_size": 3}),
    "language": (language.language_reward, {}),
    "similarity": (similarity.similarity_reward, {}),
}


def seeds() -> list[str]:
    """Completions to mutate: right and wrong ones of every kind, and the attacks on the sandbox."""
    labelled = (Path(__file__).parent / "math_labelled.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["completion"] for line in labelled[::10]]
    texts += [attacks.as_completion(attack.program) for attack in attacks.attacks("/tmp/none", 9)]
    texts += [attacks.as_completion(program) for program in attacks.MUST_PASS.values()]
    return [*texts, "<think> 6 * 3 = 18 </think> <answer> ( 6 * 3 ) + 9 = 27 </answer>", "<answer>72</answer>"]


_PIECES = """<think> </think> <answer> </answer> ``` ```python def f(x): return import os lambda while True: \\boxed{ }
#### 72 6 3 9 27 + - * / ( ) = ** // 99**98**97 1e9 0x1 \\frac \\sqrt { } $ % , . : ; " ' # @ [ ] yes 是 の é"""
PIECES = st.sampled_from([*_PIECES.split(), " ", "\n", "\n    ", "\x00", "\ud800", "\uff10", "\u0661", "\u202e"])


@st.composite
def mutated(draw: Any, texts: list[str]) -> str:
    """A completion with parts of it cut out, doubled or replaced."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(0, 4))):
        start, end = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
        text = text[:start] + draw(st.one_of(PIECES, st.just(text[start:end] * 2), st.just(""))) + text[end:]
    return text[:4000]


COMPLETIONS = st.one_of(mutated(seeds()), st.lists(PIECES, max_size=40).map("".join), st.text(max_size=200))


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    code.start(1)
    math.start(1)
    yield
    code.stop()
    math.stop()


@pytest.mark.slow
@pytest.mark.timeout(0 if EXAMPLES > 1000 else 300)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(completion=COMPLETIONS, status=st.sampled_from(["stop", "stop", "stop", "length", "error"]))
def test_no_completion_breaks_a_verifier(completion: str, status: str) -> None:
    columns = {name: [value] for name, value in ROWS.items()} | {"completion_ids": [list(map(ord, completion))]}
    for name, (reward, arguments) in REWARDS.items():
        call = partial(reward, ["p"], [completion], status=[status], prefill=[""], **columns, **arguments)
        value, seconds, cpu_seconds = timed(call)
        if cpu_seconds > CPU_SECONDS or seconds > SLACK.get(name, math_.inf):  # once may be a pause of the machine's
            value, seconds, cpu_seconds = timed(call)
        assert value is None or -1.0 <= value <= 1.0, name
        assert (value is None) <= (status == "error"), f"{name}: a completion may not be unscorable by its own doing"
        assert cpu_seconds < CPU_SECONDS, f"{name} took {cpu_seconds:.2f} s of the processor"
        assert seconds < SLACK.get(name, math_.inf), f"{name} took {seconds:.2f} s"


def timed(call: Callable[[], list[float | None]]) -> tuple[float | None, float, float]:
    """The one reward that a call gives, its seconds, and those of the processor."""
    begun, cpu_begun = time.monotonic(), time.process_time()
    (value,) = call()
    return value, time.monotonic() - begun, time.process_time() - cpu_begun
