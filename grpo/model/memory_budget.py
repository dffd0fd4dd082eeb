"""What a run on one GPU takes of its memory, computed from the model's shape and the recipe alone, without torch.

Numbers are bytes (1 GB is 10^9). A run has two peaks, the update and the rollout; each is a sum of parts that are there
at the same time. Activations are those of a Llama-shaped model under autocast to bfloat16, as they were measured by
size on a CPU. Nothing here was measured on a GPU yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from grpo.config import Recipe
from grpo.model.shape import Shape

CONTEXT = 1.0e9  # CUDA's own, and what the allocator can't give out
LOGITS = 1.9e9  # a chunk of the head's logits, the chunk that is kept, and three float32 tiles: devices.LOGITS
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: the code, its block's scale in 8 bits, that scale's own
# Shares of the device's memory, which the hf backend takes from here. Shares of what is free would differ when a run is
# resumed.
CACHE_SHARE = 0.25  # for keys and values, where the recipe gives no number
AUTOMATIC_SHARE = 0.5  # of what is free, for the activations of a micro-batch whose size the recipe leaves open
FEWEST_TOKENS, MOST_TOKENS = 256, 32768  # of such a micro-batch
KEPT_SHARE = 0.15  # weights and cache of up to this size stay between rollouts, where CUDA graphs read them


@dataclass(frozen=True)
class Budget:
    """Bytes by part: on the GPU during the update and during the rollout, and in the host's memory throughout."""

    update: dict[str, float]
    rollout: dict[str, float]
    host: dict[str, float]

    def lines(self) -> list[str]:
        """Each peak as a sum in GB, for a recipe's header."""
        sums = {"update": self.update, "rollout": self.rollout, "host": self.host}
        return [
            f"{peak} {sum(parts.values()) / 1e9:.1f} GB: "
            + " + ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)
            for peak, parts in sums.items()
            if sum(parts.values())
        ]


def budget(recipe: Recipe, shape: Shape, card: float, *, shards: int = 1, teacher: Shape | None = None) -> Budget:
    """The budget of a bfloat16 run on each GPU of ``card`` bytes, with hf or a colocated vLLM that sleeps. Weights and
    what belongs to them are divided among ``shards`` GPUs (FSDP2); DDP holds them whole on each. A ``teacher`` in the
    process is whole on each in any case."""
    model = recipe.model
    weights, trained, each = weights_of(recipe, shape)
    state = _state(recipe)
    adamw_here, adamw_host = trained * sum(state), 0.0
    if recipe.optimizer.offload:
        matrices = shape.matrices(model.lora.r if model.lora else None)
        adamw_here, adamw_host = 0.0, adamw_here + _rounded_up(matrices, state)
    has_reference = recipe.stage == "grpo" and recipe.algorithm.beta > 0 and model.lora is None
    reference = shape.parameters * (4 if recipe.algorithm.sync_ref_model else 2) * has_reference
    held = {"weights": weights / shards, "AdamW": adamw_here / shards, "reference": float(reference) / shards}
    held["teacher"] = teacher_bytes(recipe, teacher)
    engine = _engine(recipe, shape, card, shards)
    update = held | {
        "gradients": trained * each / shards,
        # gradient, cast weight
        "of the head": shape.embedding * (4 + 2 if each == 4 else 2) * (model.lora is None),
        "gathered layers": 2 * 2.0 * shape.parameters / shape.layers * (shards > 1),  # this one, and the next one
        "logits": LOGITS * (2 if teacher is not None else 1),  # a tile of the teacher's own, and of the divergence
        "CUDA": CONTEXT,
    }
    if _is_vllm_here(recipe):
        update["vLLM asleep"] = CONTEXT
    elif sum(engine.values()) <= KEPT_SHARE * card:
        update["kept to sample"] = sum(engine.values())
    kept = shape.kept_token(checkpointing=model.gradient_checkpointing)
    update["activations"] = kept * micro_batch_tokens(recipe, kept, free=card - sum(update.values()))
    order = (*held, "gradients", "of the head", "gathered layers", "activations", "logits", "CUDA")
    update = {part: update[part] for part in order} | {part: size for part, size in update.items() if part not in order}
    rollout = held | engine | {"CUDA": CONTEXT} if recipe.stage == "grpo" else {}
    return Budget(update, rollout, {"AdamW": adamw_host})


def teacher_bytes(recipe: Recipe, teacher: Shape | None, *, usual: int = 2) -> float:
    """Of a teacher in the process, frozen; ``usual``: bytes a weight of ``teacher.dtype: auto``."""
    if teacher is None or recipe.teacher is None:
        return 0.0
    return float(teacher.parameters * {"auto": usual, "float32": 4, "bfloat16": 2}[recipe.teacher.dtype])


def micro_batch_tokens(recipe: Recipe, kept: float, *, free: float) -> int:
    """Tokens of a micro-batch: as the recipe says, or as ``update.micro_batch_size`` finds by what is free."""
    if recipe.training.micro_batch_tokens is not None:
        return recipe.training.micro_batch_tokens
    fits = min(AUTOMATIC_SHARE * max(free, 0) / kept, MOST_TOKENS)
    return max(1 << (max(int(fits), 1).bit_length() - 1), FEWEST_TOKENS)


def _is_vllm_here(recipe: Recipe) -> bool:
    rollout = recipe.rollout
    return recipe.stage == "grpo" and rollout.backend != "hf" and rollout.vllm_mode == "colocate"


def weights_of(recipe: Recipe, shape: Shape, *, frozen: int = 2) -> tuple[float, int, int]:
    """Bytes of all weights, the number of trained ones, and bytes of each of these."""
    model = recipe.model
    if model.lora is None:
        each = 2 if model.weights == "bfloat16" else 4
        return shape.parameters * each, shape.parameters, each
    adapters = shape.adapters(model.lora.r)
    frozen = shape.parameters * 2.0
    if model.load_in_4bit:
        frozen -= shape.linears * (2 - NF4)
    return frozen + adapters * 4, adapters, 4


def _state(recipe: Recipe) -> list[float]:
    """Bytes a trained weight of each tensor that AdamW keeps: two moments, each with a float32 scale a block of 256 if
    in 8 bits, and what a bfloat16 weight lacks of a float32 one."""
    moments = [4.0, 4.0] if recipe.optimizer.optim == "adamw_torch" else [1.0, 1.0, 4 / 256, 4 / 256]
    return moments + [2.0] * (recipe.model.weights == "bfloat16")


def _rounded_up(matrices: list[int], state: list[float]) -> int:
    """Bytes that page-locked tensors take beyond their own: torch makes each of them a power of two."""
    sizes = [round(elements * each) for elements in matrices for each in state]
    return sum((1 << (size - 1).bit_length()) - size for size in sizes)


def _engine(recipe: Recipe, shape: Shape, card: float, shards: int) -> dict[str, float]:
    """What generates takes while it does."""
    rollout = recipe.rollout
    if recipe.stage != "grpo":
        return {}
    if rollout.backend != "hf":
        return {"vLLM": rollout.vllm_gpu_memory_utilization * card} if _is_vllm_here(recipe) else {}
    shares = shards == 1 and (recipe.model.lora is not None or recipe.model.weights == "bfloat16")
    tokens = recipe.data.max_prompt_length + rollout.max_completion_length
    tokens += 0 if recipe.environment is None else recipe.environment.max_environment_tokens
    most = rollout.max_batch_size * tokens * shape.kv_token
    bound = rollout.kv_cache_gb * 1e9 if rollout.kv_cache_gb else CACHE_SHARE * card
    return {"copy": shape.parameters * 2.0 * (not shares), "keys and values": float(min(most, bound))}


def card_of(hardware: str) -> float | None:
    """Bytes of the card that a header's ``hardware`` line names. Cards are sold by GiB; 80 GB are 85.5e9 bytes."""
    found = re.search(r"one GPU of (\d+) GB", hardware)
    return int(found[1]) * 2**30 * 0.995 if found else None
