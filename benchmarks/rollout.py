"""The hf backend's rollout against transformers' own generation and against vLLM, and against a batch of one.

    python -m benchmarks.rollout [--dtype bfloat16] [--length 128] [--groups 1 2 4 8 16]

Each way samples the same prompts at temperature 1 to their natural ends, in turn, round after round, after a short
round to warm up. Reported are medians of completion tokens a second. ``generate`` is transformers' own, with a dynamic
and a static cache; ``generate_batch`` is its continuous batching. vLLM is a server of its own, one for each number of
threads given, and is stopped while others run. A way that cannot run is reported and left out.

Agreement, in float32: every sampled token's log-probability is compared with the model's own forward pass, and
completions are sampled again alone, a batch of one, with their keys. Where two such completions part, the uniform
number must lie within rounding of the boundary between the two tokens: the largest distance is reported. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import end_in_order, hardware, median, print_table, timed, turn, versions
from benchmarks.models import make_backend
from benchmarks.rollout_agreement import agreement
from benchmarks.rollout_vllm import vllm_server, vllm_version
from benchmarks.trl.case import Case
from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.backends.hf.draw import sample
from grpo.model.devices import DTYPES
from grpo.randomness import key
from grpo.types import Prompt

Way = Callable[[list[Request], int], list[int]]  # from requests and longest length to the completions' lengths


def make_requests(tokenizer: Any, prompts: int, completions: int, round_: int) -> list[Request]:
    """Countdown questions of about 100 tokens; other keys in every round."""
    rows = Case(prompts=prompts, steps=1).rows()
    encoded = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    return [
        Request(Prompt(i, "", "", ids), [key(7, round_, i, g) for g in range(completions)])
        for i, ids in enumerate(encoded)
    ]


def ours(backend: HFBackend) -> Way:
    def way(requests: list[Request], length: int) -> list[int]:
        groups = backend.generate(requests, Sampling(length), 0)
        return [len(c.token_ids) for group in groups for c in group]

    return way


def transformers_generate(model: Any, tokenizer: Any, cache: str | None) -> Way:
    """``generate`` on all completions at once: the prompts repeated and padded on the left."""

    def way(requests: list[Request], length: int) -> list[int]:
        rows = [r.prompt.token_ids for r in requests for _ in r.keys]
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            **_sampling(tokenizer, length),
            **({"cache_implementation": cache} if cache else {}),
        )
        return [_until_eos(row, tokenizer.eos_token_id) for row in out[:, width:].tolist()]

    return way


def transformers_generate_batch(model: Any, tokenizer: Any) -> Way:
    """transformers' continuous batching. It sizes its cache by the device's free memory, which is given on a CPU."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    def way(requests: list[Request], length: int) -> list[int]:
        rows = [r.prompt.token_ids for r in requests for _ in r.keys]
        pages = -(-(max(map(len, rows)) + length) // 64) * len(rows)
        settings = (
            {"page_size": 64, "num_blocks": pages, "max_batch_tokens": 4096} if model.device.type == "cpu" else {}
        )
        found = model.generate_batch(
            rows,
            generation_config=GenerationConfig(**_sampling(tokenizer, length)),
            continuous_batching_config=ContinuousBatchingConfig(**settings),
        )
        assert len(found) == len(rows)
        return [len(output.generated_tokens) for output in found.values()]

    return way


def _sampling(tokenizer: Any, length: int) -> dict[str, Any]:
    return {
        "max_new_tokens": length,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _until_eos(tokens: list[int], eos: int) -> int:
    return tokens.index(eos) + 1 if eos in tokens else len(tokens)


def measure(ways: dict[str, Way], requests_of: Callable[[int], list[Request]], options: Any) -> dict[str, Any]:
    """Tokens a second of each way, all in turn. A way that fails is left out from then on."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[float]] = {name: [] for name in ways}
    errors: dict[str, str] = {}
    for round_ in range(options.rounds + 1):
        for name, way in ways.items():
            if name in errors:
                continue
            try:
                with turn(options.lock):
                    begun = time.perf_counter()
                    lengths = way(requests_of(round_), options.length if round_ else min(8, options.length))
                    seconds = time.perf_counter() - begun
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{name}: {errors[name]}", flush=True)
                continue
            if round_:
                rates[name].append(sum(lengths) / seconds)
                tokens[name].append(float(sum(lengths)))
    found: dict[str, Any] = {
        name: {"tokens_per_s": median(rates[name]), "tokens": median(tokens[name]), "rounds": len(rates[name])}
        for name in ways
        if name not in errors
    }
    return found | {name: {"error": why} for name, why in errors.items()}


def all_ways(options: argparse.Namespace, backend: HFBackend, tokenizer: Any, stack: ExitStack) -> dict[str, Way]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype]).to(backend.device).eval()
    batched = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype]).to(backend.device).eval()
    ways: dict[str, Way] = {
        "hf backend": ours(backend),
        "generate, dynamic cache": transformers_generate(model, tokenizer, None),
        "generate, static cache": transformers_generate(model, tokenizer, "static"),
        "generate_batch": transformers_generate_batch(batched, tokenizer),
    }
    ways = {name: way for name, way in ways.items() if not options.ways or name in options.ways}
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for threads in options.vllm_threads if Path(options.vllm_python).exists() else []:
        name = f"vLLM, {threads} threads"
        if not options.ways or name in options.ways:
            try:
                with turn(options.lock):
                    ways[name] = stack.enter_context(vllm_server(options, threads, folder, tokenizer.eos_token_id))
            except RuntimeError as error:
                print(error, flush=True)
    return ways


def against_group_size(options: argparse.Namespace, ways: dict[str, Way], tokenizer: Any) -> dict[str, Any]:
    """Tokens a second for the same number of completions from fewer and fewer prompts."""
    total = options.prompts * options.completions
    found: dict[str, Any] = {}
    for G in options.groups:
        rows = measure(ways, lambda round_, G=G: make_requests(tokenizer, total // G, G, round_), options)
        found[str(G)] = {name: row.get("tokens_per_s") for name, row in rows.items()}
    print_table(f"tokens/s of {total} completions, by completions a prompt", found)
    return found


def share_of_sampling(options: argparse.Namespace, backend: HFBackend, tokenizer: Any) -> float:
    """The share of a rollout's time that turning logits into tokens takes."""
    with turn(options.lock), timed({"sample": sample}, "grpo.backends", backend.device) as seconds:
        begun = time.perf_counter()
        backend.generate(make_requests(tokenizer, options.prompts, options.completions, 1), Sampling(options.length), 0)
        return seconds["sample"] / (time.perf_counter() - begun)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Case.model)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", help="only these ways, by their names in the table")
    parser.add_argument(
        "--groups", type=int, nargs="*", default=[], help="also by completions a prompt, at equal total"
    )
    parser.add_argument("--check", type=int, default=64, help="completions to sample again alone; 0: no agreement")
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python")
    parser.add_argument("--vllm-threads", type=int, nargs="*", default=[1, torch.get_num_threads()])
    parser.add_argument("--vllm-args", nargs="*", default=["--enforce-eager"])
    parser.add_argument("--lock", help="a file whose lock to take around each part, where other jobs take it too")
    options = parser.parse_args(arguments)

    end_in_order()
    backend, policy = make_backend(options.model, options.dtype)
    tokenizer = policy.tokenizer
    result: dict[str, Any] = {"versions": versions(), "hardware": hardware(), "settings": vars(options)}
    if Path(options.vllm_python).exists():
        result["versions"]["vllm"] = vllm_version(options.vllm_python)
    with ExitStack() as stack:
        ways = all_ways(options, backend, tokenizer, stack)
        requests = lambda round_: make_requests(tokenizer, options.prompts, options.completions, round_)  # noqa: E731
        result["ways"] = rows = measure(ways, requests, options)
        print_table(f"{options.model}, {options.dtype}, {options.prompts} x {options.completions}", rows)
        if options.groups:
            local = {name: ways[name] for name in list(ways)[:2]}
            result["tokens_per_s_by_group_size"] = against_group_size(options, local, tokenizer)
    best = max((r["tokens_per_s"] for n, r in rows.items() if n != "hf backend" and "error" not in r), default=None)
    if best and "tokens_per_s" in rows.get("hf backend", {}):
        result["tokens_per_s_over_best_other"] = rows["hf backend"]["tokens_per_s"] / best
    result["share_of_sampling"] = share_of_sampling(options, backend, tokenizer)
    if options.check and options.dtype == "float32":
        with turn(options.lock):
            result["agreement"] = agreement(backend, requests(1), options.length, options.check)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
