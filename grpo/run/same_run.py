"""Is a resumed run the one that wrote the checkpoint? If not, it is refused, with the keys that differ.

Exact resume replays the same draws in the same shapes on the same number of threads and processes. A run that goes on
under another seed or model would be neither the old run nor a new one. On another number of processes it is the same
run, to rounding: that is what a user has who gets fewer GPUs, or more.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from itertools import zip_longest
from typing import Any

from pydantic import ValidationError

from grpo.config import Recipe
from grpo.config.load import LEFT_OUT
from grpo.errors import UserError
from grpo.run.secrets import recipe_without_secrets

log = logging.getLogger("grpo")

_ABSENT = object()

# Keys of the manifest that a resumed run may change: they say when to stop and save, what to watch, where to write,
# where engines are and how weights get there.
MAY_CHANGE = (
    "recipe.rollout.vllm_enable_sleep_mode",
    "recipe.rollout.vllm_generation_timeout",
    "recipe.rollout.vllm_gpu_memory_utilization",
    "recipe.rollout.vllm_group_",
    "recipe.rollout.vllm_python",
    "recipe.rollout.vllm_server_",
    "recipe.rollout.vllm_start_timeout",
    "recipe.rollout.vllm_sync_",
    "recipe.rollout.vllm_weight_transfer",
    "recipe.evaluation",
    "recipe.optimizer.offload",
    "recipe.tracking",
    "recipe.scoring.workers",
    "recipe.scoring.timeout",
    "recipe.scoring.memory_limit_gb",
    "recipe.scoring.environment",
    "recipe.scoring.max_failure_rate",
    "recipe.training.output_dir",
    "recipe.training.max_steps",
    "recipe.training.max_seconds",
    "recipe.training.eval_every",
    "recipe.training.save_every",
    "recipe.training.save_total_limit",
    "recipe.training.log_rollouts_every",
    "recipe.training.ddp_timeout",
    "recipe.training.peer_timeout",
    "recipe.training.num_threads",  # the threads really used are compared instead
    "recipe.training.dollars_per_hour",
)
# These change results by rounding alone. A run that ran out of memory must be able to go on with smaller batches.
ROUNDS_DIFFERENTLY = (
    "recipe.model.attn_implementation",
    "recipe.model.gradient_checkpointing",
    "recipe.rollout.kv_cache_gb",
    "recipe.rollout.max_batch_size",
    "recipe.training.micro_batch_tokens",
    "recipe.training.micro_batch_size",
    "versions",
    "world_size",
)


def run_identity(recipe: Recipe, *, world_size: int, threads: int) -> dict[str, Any]:
    """What makes a run this run: for the manifest when saving, for ``check_same_run`` when resuming."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {
        "recipe": recipe_without_secrets(recipe),
        "world_size": world_size,
        "threads": threads,
        "versions": {"python": platform.python_version(), **versions},
    }


def check_same_run(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume as another run: raises UserError that lists each differing key of ``now``, old -> new.

    Keys under MAY_CHANGE pass; those under ROUNDS_DIFFERENTLY pass with a warning that the run will not be equal to the
    bit, and so does the number of threads on another number of processes. Keys of the manifest that ``now`` does not
    name are not compared.
    """
    shared = {key: manifest[key] for key in now.keys() & manifest.keys()}
    if "recipe" in shared:
        shared["recipe"] = _of_this_version(shared["recipe"])
    found = [
        (key, old, new)
        for key, old, new in differences(shared, json.loads(json.dumps(now)))
        if LEFT_OUT not in old + new  # secrets may change, and are not shown
    ]
    # A launch of several processes sets the number of threads too.
    rounds = ROUNDS_DIFFERENTLY + (("threads",) if "world_size" in [key for key, *_ in found] else ())
    lines = {
        key: f"{key.removeprefix('recipe.')}: {old} -> {new}"
        for key, old, new in found
        if not key.startswith(MAY_CHANGE)
    }
    if refused := [line for key, line in lines.items() if not key.startswith(rounds)]:
        raise UserError(
            "the checkpoint belongs to another run; it differs in\n  "
            + "\n  ".join(refused)
            + "\nResume with the values that it was made with, or start a new run in another training.output_dir."
        )
    if lines:
        log.warning("resumed with changes that round differently (not equal to the bit): %s", "; ".join(lines.values()))


def _of_this_version(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier version wrote, with its defaults for the keys that have come since."""
    try:
        return Recipe.model_validate(recipe).model_dump(mode="json")
    except ValidationError:  # it has a key that is gone: compared as it is
        return recipe


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, old value, new value) for each leaf where two JSON values differ, list items by their index."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list):
        for index, pair in enumerate(zip_longest(old, new, fillvalue=_ABSENT)):
            yield from differences(*pair, f"{key}.{index}")
    elif old != new:
        yield key, _shown(old), _shown(new)


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
