"""Metrics of an optimizer step: sums over micro-batches become sums over the step, and these become means."""

from __future__ import annotations

import math

import numpy as np
import torch
from accelerate import Accelerator

RATIO = "sampling/importance_sampling_ratio"


def combined(name: str, values_N: torch.Tensor) -> torch.Tensor:
    """Combine a metric's values from N parts of the step: minimum if its name ends in ``/min``, maximum if in ``/max``,
    else sum.

    A part with nothing to measure (padding) has inf, 0 and 0 there.
    """
    return {"min": torch.amin, "max": torch.amax}.get(name.rpartition("/")[2], torch.sum)(values_N)


def over_processes(accelerator: Accelerator, sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """The same over processes. Every process has the same names, padding micro-batches included."""
    names = sorted(sums)
    every_WN = accelerator.gather(torch.stack([sums[name].double() for name in names])[None])
    return {name: float(combined(name, column_W)) for name, column_W in zip(names, every_WN.unbind(1), strict=True)}


def step_metrics(totals: dict[str, float], norm: float) -> dict[str, float]:
    """Means from sums: each is divided by its own ``/count`` if it has one, else by the number of tokens."""
    tokens = max(totals.pop("tokens"), 1.0)
    counts = {name.removesuffix("/count"): totals.pop(name) for name in list(totals) if name.endswith("/count")}
    metrics = {"loss": totals.pop("loss"), "grad_norm": norm}
    metrics |= {name: totals.pop(name) for name in ("policy_loss", "aux_loss") if name in totals}
    squares = totals.pop(f"{RATIO}/squares", None)
    for name, total in totals.items():
        if name.endswith(("/min", "/max")):
            metrics[name] = total
        else:
            mean = total / max(counts.get(name.removesuffix("/mean"), tokens), 1.0)
            metrics[f"{name}_mean" if name.startswith("clip_ratio/") else name] = mean
    if squares is not None:
        square, mean = squares / max(counts[RATIO], 1.0), metrics[f"{RATIO}/mean"]
        metrics[f"{RATIO}/std"] = math.sqrt(max(square - mean**2, 0.0))
        metrics["sampling/effective_sample_size"] = min(mean**2 / square, 1.0) if square > 0 else 0.0
    return metrics


def mean_over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over a step's optimizer updates. ``sampling/`` compares sampler and trainer: it is the first update's."""
    done = [u for u in updates if "skipped" not in u]
    metrics = {"updates_skipped": float(len(updates) - len(done))}
    if done:
        metrics |= {name: float(np.mean([u[name] for u in done])) for name in done[0]}
        metrics |= {name: value for name, value in done[0].items() if name.startswith("sampling/")}
    return metrics
