"""Episodes of several turns with a slow tool, beside as many tokens drawn in one turn, with hf and with vLLM.

    python -m benchmarks.turns [--model data/tiny_base] [--overlap-steps 4 16 64] [--rounds 3]

64 episodes of 4 turns; a turn has 16 to 48 tokens, and behind each but the last a tool takes 50 ms and answers with 16
tokens. "One turn" are 64 completions of the same prompts, each as long as all turns of its episode together. So both
draw the same number of tokens by the same weights, and that is what is counted; the episodes read the answers besides.
"Of all tokens" are completions as long as the episodes with their answers, which are drawn there. Lengths are forced,
and other ones in every round. All ways take turns, round after round, after a short round to warm up; reported are
medians. ``--page`` writes the table into docs/results/turns.md. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.algorithms import put
from benchmarks.common import ROOT, end_in_order, hardware, median, print_table, turn, versions
from benchmarks.models import make_backend
from benchmarks.rollout import make_requests
from benchmarks.rollout_vllm import started, vllm_version
from benchmarks.trl.case import Case
from grpo.backends.base import Place, Request, Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.backends.sequence import Conversation, SampledSequence
from grpo.backends.vllm.completions import TurnByTurn, generate_payload
from grpo.backends.vllm.pool import Pool

PAGE = ROOT / "docs/results/turns.md"
BEGIN, END = "<!-- begin: benchmarks.turns -->", "<!-- end: benchmarks.turns -->"

ONE, ALL = "one turn", "one turn of all tokens"

Lengths = dict[int, list[int]]  # of each turn, by key
Way = Callable[[list[Request], Lengths], int]  # returns how many tokens the model drew, but for answers


def lengths_of(requests: list[Request], turns: int, mean: int, round_: int) -> Lengths:
    """A turn has from half to three halves of ``mean`` tokens, which the round determines."""
    drawn = random.Random(round_)
    keys = [key for request in requests for key in request.keys]
    return {key: [drawn.randint(max(1, mean // 2), max(1, 3 * mean // 2)) for _ in range(turns)] for key in keys}


class SlowTool:
    """``Turns`` whose tool sleeps and then says ``answer`` random tokens."""

    stop: Sequence[str] = ()
    max_turn_length = None

    def __init__(self, requests: list[Request], lengths: Lengths, seconds: float, answer: int, overlap_steps: int):
        self.requests, self.lengths, self.seconds, self.answer_length = requests, lengths, seconds, answer
        self.overlap_steps = overlap_steps
        self.max_environment_tokens = answer * max(map(len, lengths.values()))
        self.done = dict.fromkeys(lengths, 0)  # turns, by key
        self.threads = ThreadPoolExecutor(len(lengths))

    def answer(
        self, place: Place, token_ids: Sequence[int], start: int, ended: str, *, last: bool
    ) -> Future[list[int] | None]:
        key = self.requests[place[0]].keys[place[1]]
        self.done[key] += 1
        over = self.done[key] == len(self.lengths[key])
        return self.threads.submit(self._call, key, over)

    def _call(self, key: int, over: bool) -> list[int] | None:
        if over:
            return None
        time.sleep(self.seconds)
        drawn = random.Random(key + self.done[key])
        return [drawn.randrange(10, 300) for _ in range(self.answer_length)]


@contextmanager
def ending(ended: Callable[[int, list[int]], bool]) -> Iterator[None]:
    """Within it, completions and turns end where ``ended`` says so of a key and the tokens."""
    ours = HFBackend._ended
    HFBackend._ended = lambda self, key, tokens, stop: ended(key, tokens)  # type: ignore[method-assign]
    try:
        yield
    finally:
        HFBackend._ended = ours  # type: ignore[method-assign]


def in_one_turn(backend: HFBackend, answers: int = 0) -> Way:
    """``answers`` tokens a completion are drawn in place of a tool's answers."""

    def way(requests: list[Request], lengths: Lengths) -> int:
        longest = max(map(sum, lengths.values())) + answers
        with ending(lambda key, tokens: len(tokens) == sum(lengths[key]) + answers):
            groups = backend.generate(requests, Sampling(longest), 0)
        return sum(len(c.token_ids) - answers for group in groups for c in group)

    return way


def in_turns(backend: HFBackend, options: argparse.Namespace, overlap_steps: int) -> Way:
    def way(requests: list[Request], lengths: Lengths) -> int:
        tool = SlowTool(requests, lengths, options.tool, options.answer, overlap_steps)

        sampling = Sampling(max(map(sum, lengths.values())) + 1)  # so that none is cut before its tool ends it
        with ending(lambda key, tokens: len(tokens) == lengths[key][tool.done[key]]):
            groups = backend.generate(requests, sampling, 0, turns=tool)
        answers = sum(tool.done.values()) - len(tool.done)
        return sum(len(c.token_ids) for group in groups for c in group) - answers * options.answer

    return way


@dataclass(frozen=True)
class Forced(Conversation):
    """Says how long a turn is: an engine draws as many tokens as it is asked for."""

    lengths: Lengths

    def left(self, sequence: SampledSequence) -> int:
        return self.lengths[sequence.key][sequence.turns]


def through_vllm(options: argparse.Namespace, stack: ExitStack) -> dict[str, Way]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    longest = 256 + options.turns * (3 * options.mean // 2 + options.answer)
    threads = torch.get_num_threads()
    url, going = stack.enter_context(started(options, threads, folder, longest=longest))
    with going():
        pool = Pool([url], 600.0)
        stack.callback(pool.close)
        pool.run(pool.servers[0].label(0))
        pool.up([url])

    def payload(token_ids: list[int], key: int, sampling: Sampling) -> dict[str, Any]:
        return generate_payload(token_ids, key, sampling, [], version=0, model=None)

    def one(answers: int) -> Way:
        def way(requests: list[Request], lengths: Lengths) -> int:
            asked = [
                payload(r.prompt.token_ids, key, Sampling(sum(lengths[key]) + answers))
                for r in requests
                for key in r.keys
            ]
            with going():
                return sum(len(answer["token_ids"]) - answers for _, answer in pool.submit(asked))

        return way

    def several(requests: list[Request], lengths: Lengths) -> int:
        tool = SlowTool(requests, lengths, options.tool, options.answer, 0)
        sampling = Sampling(max(map(sum, lengths.values())) + 1)
        player = TurnByTurn(requests, Forced(sampling, tool, lengths), payload, pool.ask, adapters=False)
        with going():
            return sum(s.drawn for _, s in pool.begin([player.play(s) for s in player.beginnings()]))

    answers = (options.turns - 1) * options.answer
    return {f"vllm, {ONE}": one(0), f"vllm, {ALL}": one(answers), "vllm, turns": several}


def measure(ways: dict[str, Way], tokenizer: Any, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds and CPU seconds of this process, of each way, all in turn."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    drawn: dict[str, list[int]] = {name: [] for name in ways}
    for round_ in range(options.rounds + 1):
        requests = make_requests(tokenizer, options.prompts, options.completions, round_)
        lengths = lengths_of(requests, options.turns, options.mean if round_ else 2, round_)
        for name, way in ways.items():
            with turn(options.lock):
                begun = time.perf_counter(), time.process_time()
                tokens = way(requests, lengths)
                seconds = time.perf_counter() - begun[0], time.process_time() - begun[1]
            assert tokens == sum(map(sum, lengths.values())), f"{name} drew {tokens}"
            if round_:
                taken[name].append(seconds)
                drawn[name].append(tokens)
    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in taken.items():
        backend = name.split(",")[0]
        rows[name] = {
            "seconds": median([s for s, _ in seconds]),
            "cpu_seconds": median([s for _, s in seconds]),
            "tokens": median([float(n) for n in drawn[name]]),
            "times_one_turn": _times(seconds, taken[f"{backend}, {ONE}"]),
            "times_all_tokens": _times(seconds, taken[f"{backend}, {ALL}"]),
        }
    return rows


def _times(own: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """The median over the rounds of the seconds of one way over those of another."""
    return median([ours / theirs for (ours, _), (theirs, _) in zip(own, other, strict=True)])


def part(results: dict[str, dict[str, dict[str, Any]]], options: argparse.Namespace, where: dict[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in where.items())
    lines = [BEGIN, "", "| model | way | seconds | tokens drawn | times one turn | of all tokens |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for model, rows in results.items():
        lines += [
            f"| {model} | {name} | {row['seconds']:.2f} | {row['tokens']:.0f} | {row['times_one_turn']:.2f} "
            f"| {row['times_all_tokens']:.2f} |"
            for name, row in rows.items()
        ]
    n = options.prompts * options.completions
    told = (
        f"{n} episodes of {options.turns} turns of {options.mean} tokens on average, a tool of {1000 * options.tool:g} "
        f"ms with answers of {options.answer} tokens, {options.dtype}; medians of {options.rounds} rounds in turn. "
        "Counted are the tokens that the model draws, which are the same in each way; in one turn of all tokens the "
        "answers are drawn besides, which episodes only read."
    )
    return "\n".join([*lines, "", told, "", f"Measured on: {machine}.", "", END])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[Case.model, "data/tiny_base"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8, help="of a prompt")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--mean", type=int, default=32, help="tokens of a turn")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--tool", type=float, default=0.05, help="seconds")
    parser.add_argument("--overlap-steps", type=int, nargs="+", default=[16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python", help="a path that is not there: without vLLM")
    parser.add_argument("--vllm-args", nargs="*", default=["--enforce-eager"])
    parser.add_argument("--page", action="store_true", help="write docs/results/turns.md")
    parser.add_argument("--lock", help="a file whose lock to take around each part, where other jobs take it too")
    options = parser.parse_args(arguments)

    end_in_order()
    found: dict[str, Any] = {"versions": versions(), "hardware": hardware(), "settings": vars(options)}
    if Path(options.vllm_python).exists():
        found["versions"]["vllm"] = vllm_version(options.vllm_python)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for model in options.model:
        backend, policy = make_backend(model, options.dtype)
        answers = (options.turns - 1) * options.answer
        ways = {f"hf, {ONE}": in_one_turn(backend), f"hf, {ALL}": in_one_turn(backend, answers)}
        ways |= {f"hf, turns, overlap_steps {n}": in_turns(backend, options, n) for n in options.overlap_steps}
        with ExitStack() as stack:
            if Path(options.vllm_python).exists():
                ways |= through_vllm(argparse.Namespace(**vars(options) | {"model": model}), stack)
            results[model] = measure(ways, policy.tokenizer, options)
        print_table(f"{model}, {options.dtype}", results[model])
    if options.page:
        put(part(results, options, found["versions"] | found["hardware"]), PAGE, "# Turns: episodes beside one turn")
    print(json.dumps(found | {"ways": results}))


if __name__ == "__main__":
    main()
