"""Does the engine hold the trainer's weights, and sample from the trainer's distribution? Pure comparisons.

There are three checks, and each finds what the others miss. The first reads a server's settings. The second compares a
fingerprint of every parameter and sees a single changed element. The third compares the log-probabilities of sampled
sequences and sees how the parameters are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grpo.backends.vllm.api import cast
from grpo.backends.vllm.serve import RANGE, supported

PROBE_TEXT = "Let me think: 3 + 4 = 7, and 12 - 5 = 7. The answer is"
PROBES = 4  # sequences
MOST_UNKNOWN = 0.05  # share of a probe's tokens of which an engine may give no log-probability
PROBE_TOKENS = 16  # of each; none ends earlier, because a few tokens would say too little
# Largest mean difference in nats between engine and trainer over a probe; measured values are in docs/backends.md.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
SUM_TOLERANCE = 1e-12  # float64 sums in another order
SQUARES_TOLERANCE = 1e-9  # torch's norms add elements one after the other
TEMPERATURES = [i / 10 for i in range(2, 21)]  # tried as explanations of a wrong probe


@dataclass(frozen=True)
class Probe:
    """Sequences that an engine sampled, with the log-probabilities that it gave."""

    url: str
    prompt_ids: list[int]
    token_ids: list[list[int]]
    logprobs: list[list[float]]


def settings_problems(version: str, settings: dict[str, Any], *, dtype: str, length: int, adapters: bool) -> list[str]:
    """Settings of a server that training cannot use, each in one sentence with its cure."""
    model = settings["model_config"]
    problems = []
    if not supported(version):
        problems.append(f"it is vLLM {version}; grpo supports vllm{RANGE}")
    if (mode := model["logprobs_mode"]) != "processed_logprobs":
        problems.append(f"its --logprobs-mode is {mode}; training needs processed_logprobs (temperature included)")
    if (found := model["dtype"].removeprefix("torch.")) != dtype:
        problems.append(
            f"it computes in {found}, the recipe says {dtype}: start it with --dtype {dtype}, or set "
            f"rollout.vllm_dtype: {found}"
        )
    if model["max_model_len"] < length:
        problems.append(
            f"its --max-model-len is {model['max_model_len']}; data.max_prompt_length and the longest completion "
            f"together are {length}"
        )
    if adapters and not settings.get("lora_config"):
        problems.append("adapters travel alone (rollout.vllm_lora_sync), which needs --enable-lora --max-lora-rank R")
    extension = settings["parallel_config"]["worker_extension_cls"]
    if not extension.endswith("WorkerExtension"):
        problems.append("it lacks grpo's worker extension")
    return problems


def fingerprint_problems(
    found: list[dict[str, Any]], state: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[list[str], list[str]]:
    """Parameters that differ between engine and ``state``, and parameters that could not be compared.

    ``found`` is one dictionary a worker (``worker.WorkerExtension.grpo_fingerprint``). With tensor parallelism a
    parameter is split over workers or the same on several; with a pipeline some workers lack it.
    """
    different, unknown = [], []
    tensors = dict(cast(state, dtype))
    for name in dict.fromkeys(name for worker in found for name in worker):
        held = [worker[name] for worker in found if name in worker]
        parts, stride = held[0]["parts"], held[0]["stride"]
        if any(part not in tensors for part in parts) or (len(held) > 1 and stride > 1):
            unknown.append(name)
            continue
        # What the model keeps in float32 on purpose, an engine may round all the same.
        kept_in = getattr(torch, held[0].get("dtype", ""), dtype)
        parts_held = [tensors[part] if tensors[part].dtype == dtype else tensors[part].to(kept_in) for part in parts]
        sums = [_sums(tensor[..., ::stride]) for tensor in parts_held]
        total, squares = (sum(worker[key] for worker in held) for key in ("sum", "squares"))
        if not any(_agree(total, squares, sums, copies) for copies in _layouts(len(held), len(parts))):
            different.append(name)
    return different, unknown


def _layouts(workers: int, parts: int) -> list[list[int]]:
    """Ways in which workers may hold a parameter's parts: for each part, on how many workers.

    Either the number is the same for all parts. Or the parts are fused queries, keys and values: where there are more
    workers than key-value heads, vLLM splits the queries and puts the others on several workers.
    """
    divisors = [n for n in range(1, workers + 1) if workers % n == 0]
    return [[n] * parts for n in divisors] + [[1] + [n] * (parts - 1) for n in divisors]


def _agree(total: float, squares: float, sums: list[tuple[float, float, int]], copies: list[int]) -> bool:
    """Whether sum and sum of squares over workers are those of the parts, each held by ``copies`` workers."""
    times = list(zip(copies, sums, strict=True))
    expected_total, expected_squares, elements = (sum(n * part[i] for n, part in times) for i in range(3))
    return (
        abs(squares - expected_squares) <= SQUARES_TOLERANCE * expected_squares
        and abs(total - expected_total) <= SUM_TOLERANCE * (elements * expected_squares) ** 0.5
    )


def _sums(tensor: torch.Tensor) -> tuple[float, float, int]:
    """Sum, sum of squares and number of elements."""
    return float(tensor.sum(dtype=torch.float64)), _squares(tensor), tensor.numel()


def _squares(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)


def adapter_problems(
    found: dict[str, Any], adapter: dict[str, torch.Tensor], scale: float, dtype: torch.dtype
) -> list[str]:
    """Layers whose LoRA matrices differ between the engine's adapter and the trainer's (peft's names).

    The engine holds B multiplied by the scale in its own type, so the same is done here before they are compared.
    """
    expected: dict[tuple[str, str], float] = {}
    for name, tensor in cast(adapter, dtype):
        layer, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
        expected[layer, rest[0].lower()] = _squares(tensor * scale if rest.startswith("B") else tensor)
    problems = []
    for name, layer in found.items():
        for side in ("a", "b"):
            ours = sum(expected.pop((part, side), 0.0) for part in layer["parts"])
            if not abs(layer[side] - ours) <= SQUARES_TOLERANCE * ours:
                problems.append(f"{name}.lora_{side.upper()}")
    return problems + [f"{layer}.lora_{side.upper()} (missing)" for (layer, side), size in expected.items() if size]


def different_weights(url: str, version: int, different: list[str], compared: int) -> str:
    shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
    return (
        f"vllm server {url} does not hold the policy's weights of version {version}: {len(different)} of {compared} "
        f"parameters differ after the transfer: {shown}. If all differ, the weights are another version's or another "
        "model's; if a few, something changed them on the way or in memory"
    )


def probe_difference(probe: Probe, logprobs: list[list[float]]) -> dict[str, float]:
    """Mean and largest absolute difference, nats, between engine and trainer over a probe's tokens. A few of which the
    engine said none are left out, as a step's are."""
    said = torch.cat(_tensors(probe.logprobs))
    difference = (said - torch.cat(_tensors(logprobs))).abs()
    if float((~said.isfinite()).float().mean()) <= MOST_UNKNOWN:
        difference = difference[said.isfinite()]
    return {"mean": float(difference.mean()), "max": float(difference.max())}


def _tensors(rows: list[list[float]]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def wrong_distribution(
    probe: Probe,
    difference: dict[str, float],
    tolerance: float,
    temperature: float,
    scored_at: dict[float, list[list[float]]],
) -> str:
    """The message for a probe over tolerance. It names the setting that would explain it.

    ``scored_at`` holds the trainer's log-probabilities of the probe's tokens at other temperatures.
    """
    fits = {t: probe_difference(probe, logprobs)["mean"] for t, logprobs in scored_at.items()}
    best = min(fits, key=lambda t: fits[t])
    tokens = sum(map(len, probe.token_ids))
    head = (
        f"vllm server {probe.url} does not sample from the policy's distribution: over a probe of "
        f"{tokens} tokens its log-probabilities differ from the trainer's by {difference['mean']:.4f} "
        f"nats on average ({difference['max']:.4f} at most; tolerance {tolerance:g}), although its weights are the "
        "policy's. "
    )
    if fits[best] < max(tolerance, difference["mean"] / 4):
        reported = f"They are those of temperature {best:.1f}; the recipe's is {temperature:g}"
        return head + reported + (": start the server with --logprobs-mode processed_logprobs" if best == 1.0 else "")
    return head + (
        "No temperature explains it. Usual causes: another rope or attention setting (--hf-overrides, "
        "--attention-backend), a quantized engine or cache, or a model that vLLM computes differently; if the "
        "difference is meant, raise rollout.vllm_probe_tolerance"
    )
