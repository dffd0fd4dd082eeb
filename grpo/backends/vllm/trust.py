"""Does the engine hold the trainer's weights, and sample from the trainer's distribution? Pure comparisons.

Three checks, each for what the others miss: the settings that a server runs with; a fingerprint of every parameter,
which sees a single changed element; and the log-probabilities of a sampled sequence, which see what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grpo.backends.vllm.api import cast
from grpo.backends.vllm.serve import RANGE, supported

PROBE_TEXT = "Let me think: 3 + 4 = 7, and 12 - 5 = 7. The answer is"
PROBE_TOKENS = 32
# Largest mean difference in nats between engine and trainer over a probe; measured values are in docs/backends.md.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
SUM_TOLERANCE = 1e-12  # float64 sums in another order
ADAPTER_TOLERANCE = 2e-2  # vLLM multiplies B by the scale in the engine's type
TEMPERATURES = [i / 10 for i in range(2, 21)]  # those that a wrong setting is looked for among


@dataclass(frozen=True)
class Probe:
    """What an engine sampled for the probe, with the log-probabilities that it gave."""

    url: str
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]


def settings_problems(version: str, settings: dict[str, Any], *, dtype: str, length: int, adapters: bool) -> list[str]:
    """What a server runs with that training cannot use, one sentence each with its cure."""
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
        problems.append("rollout.vllm_lora_sync: adapter needs --enable-lora --max-lora-rank R")
    extension = settings["parallel_config"]["worker_extension_cls"]
    if not extension.endswith("WorkerExtension"):
        problems.append("it lacks grpo's worker extension")
    return problems


def fingerprint_problems(
    found: list[dict[str, Any]], state: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[list[str], list[str]]:
    """Parameters that differ between engine and ``state``, and those that could not be compared.

    ``found`` is one dictionary a worker (``worker.WorkerExtension.grpo_fingerprint``). With tensor parallelism a
    parameter is split over workers or the same on all.
    """
    different, unknown = [], []
    tensors = dict(cast(state, dtype))
    for name, first in found[0].items():
        parts = [tensors.get(part) for part in first["parts"]]
        split = len(found) > 1 and first["stride"] > 1
        if any(part is None for part in parts) or split:
            unknown.append(name)
            continue
        total, squares, elements = _sums(parts, first["stride"])
        over_workers = {key: sum(worker[name][key] for worker in found) for key in ("sum", "squares")}
        if not any(
            abs(over_workers["squares"] / copies - squares) <= SUM_TOLERANCE * squares
            and abs(over_workers["sum"] / copies - total) <= SUM_TOLERANCE * (elements * squares) ** 0.5
            for copies in {1, len(found)}
        ):
            different.append(name)
    return different, unknown


def _sums(parts: list[torch.Tensor | None], stride: int) -> tuple[float, float, int]:
    """Sum, sum of squares and number of elements over tensors, of every so many columns."""
    total, squares, elements = 0.0, 0.0, 0
    for part in parts:
        assert part is not None
        part = part[..., ::stride]
        total += float(part.sum(dtype=torch.float64))
        squares += float(torch.linalg.vector_norm(part, dtype=torch.float64) ** 2)
        elements += part.numel()
    return total, squares, elements


def adapter_problems(
    found: dict[str, Any], adapter: dict[str, torch.Tensor], scale: float, dtype: torch.dtype
) -> list[str]:
    """Layers whose LoRA matrices differ between the engine's adapter and the trainer's (peft's names)."""
    expected: dict[tuple[str, str], float] = {}
    for name, tensor in cast(adapter, dtype):
        layer, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
        factor = scale**2 if rest.startswith("B") else 1.0
        expected[layer, rest[0].lower()] = factor * float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)
    problems = []
    for name, layer in found.items():
        for side in ("a", "b"):
            ours = sum(expected.pop((part, side), 0.0) for part in layer["parts"])
            if abs(layer[side] - ours) > ADAPTER_TOLERANCE * max(ours, layer[side]):
                problems.append(f"{name}.lora_{side.upper()}")
    return problems + [f"{layer}.lora_{side.upper()} (missing)" for (layer, side), size in expected.items() if size]


def different_weights(url: str, version: int, different: list[str], compared: int) -> str:
    shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
    return (
        f"vllm server {url} does not hold the policy's weights of version {version}: {len(different)} of {compared} "
        f"parameters differ after the transfer: {shown}. If all differ, the weights are another version's or another "
        "model's; if a few, something changed them on the way or in memory"
    )


def probe_difference(probe: Probe, logprobs: list[float]) -> dict[str, float]:
    """Mean and largest absolute difference, nats, between engine and trainer over a probe's tokens."""
    difference = torch.tensor(probe.logprobs).sub(torch.tensor(logprobs)).abs()
    return {"mean": float(difference.mean()), "max": float(difference.max())}


def wrong_distribution(
    probe: Probe,
    difference: dict[str, float],
    tolerance: float,
    temperature: float,
    scored_at: dict[float, list[float]],
) -> str:
    """The message for a probe over tolerance: which setting would explain it.

    ``scored_at`` holds the trainer's log-probabilities of the probe's tokens at other temperatures.
    """
    fits = {t: probe_difference(probe, logprobs)["mean"] for t, logprobs in scored_at.items()}
    best = min(fits, key=lambda t: fits[t])
    head = (
        f"vllm server {probe.url} does not sample from the policy's distribution: over a probe of "
        f"{len(probe.token_ids)} tokens its log-probabilities differ from the trainer's by {difference['mean']:.4f} "
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
