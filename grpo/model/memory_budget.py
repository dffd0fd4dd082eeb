"""What a run on one GPU takes of its memory, computed from the model's shape and the recipe alone, without torch.

Numbers are bytes (1 GB is 10^9). A run has two peaks, the update and the rollout; each is a sum of parts that are there
at the same time. Activations are those of a Llama-shaped model under autocast to bfloat16, as they were measured by
size on a CPU. Nothing here was measured on a GPU yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from grpo.config import Recipe

CONTEXT = 1.0e9  # CUDA's own, and what the allocator can't give out
LOGITS = 1.9e9  # a chunk of the head's logits, the chunk that is kept, and three float32 tiles: devices.LOGITS
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: the code, its block's scale in 8 bits, that scale's own
# Shares of the device's memory, which the hf backend takes from here. Shares of what is free would differ when a run is
# resumed.
CACHE_SHARE = 0.25  # for keys and values, where the recipe gives no number
KEPT_SHARE = 0.15  # weights and cache of up to this size stay between rollouts, where CUDA graphs read them


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model, by transformers' names: queries have ``heads``, keys and values ``kv_heads``."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    biases: bool = True  # of queries, keys and values, as Qwen2.5 has them

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, which is the head's weight too (tied)."""
        return self.vocabulary * self.hidden

    @property
    def linears(self) -> int:
        """Weights of the linear layers but the head: what 4 bits hold, and what LoRA adds to."""
        return sum(i * o for i, o in self._linears()) * self.layers

    @property
    def parameters(self) -> int:
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim * self.biases
        return self.embedding + self.linears + self.layers * (biases + 2 * self.hidden) + self.hidden

    @property
    def kv_token(self) -> int:
        """Bytes of a token's keys and values in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def adapters(self, r: int) -> int:
        return sum(r * (i + o) for i, o in self._linears()) * self.layers

    def matrices(self, r: int | None) -> list[int]:
        """Elements of each trained matrix: of all, or of adapters of rank ``r``."""
        if r is not None:
            return [r * size for linear in self._linears() for size in linear] * self.layers
        return [self.embedding, *[i * o for i, o in self._linears()] * self.layers]

    def kept_token(self, *, checkpointing: bool) -> float:
        """Bytes a token keeps for the backward pass: the float32 residual between layers, and of every layer what
        ``kernels.lean_activations`` leaves (its doc string counts it). With checkpointing only the layer that is just
        computed again keeps any, but all."""
        residual = 4 * self.hidden * (self.layers + 2)
        keys = self.kv_heads * self.head_dim
        if checkpointing:
            return residual + 2 * (8 * self.hidden + 2 * keys + 4 * self.mlp)
        return residual + 2 * self.layers * (4 * self.hidden + 2 * keys + 2 * self.mlp)

    def _linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's: queries, keys and values, output; gate and up, down."""
        h, m, q, kv = self.hidden, self.mlp, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, m), (h, m), (m, h)]


QWEN = {
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936),
    "qwen2.5-3b": Shape(36, 2048, 11008, 16, 2, 128, 151936),
}


def shape_of(name: str) -> Shape | None:
    """The shape of the model that a hub id, a path or a recipe's name speaks of, if it is known here."""
    return next((shape for known, shape in QWEN.items() if known in name.lower()), None)


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


def budget(recipe: Recipe, shape: Shape, card: float) -> Budget:
    """The budget of a bfloat16 run on one GPU of ``card`` bytes, with hf or a colocated vLLM that sleeps."""
    model, training = recipe.model, recipe.training
    weights, trained, each = _weights(recipe, shape)
    gradients = trained * each
    state = _state(recipe)
    adamw_here, adamw_host = trained * sum(state), 0.0
    if recipe.optimizer.offload:
        matrices = shape.matrices(model.lora.r if model.lora else None)
        adamw_here, adamw_host = 0.0, adamw_here + _rounded_up(matrices, state)
    has_reference = recipe.algorithm.beta > 0 and model.lora is None
    reference = shape.parameters * (4 if recipe.algorithm.sync_ref_model else 2) * has_reference
    kept = shape.kept_token(checkpointing=model.gradient_checkpointing) * (training.micro_batch_tokens or 16384)
    held = {"weights": weights, "AdamW": adamw_here, "reference": float(reference)}
    update = held | {
        "gradients": gradients,
        "of the head": shape.embedding * (4 + 2 if each == 4 else 2) * (model.lora is None),  # gradient, cast weight
        "activations": kept,
        "logits": LOGITS,
        "CUDA": CONTEXT,
    }
    engine = _engine(recipe, shape, card)
    if recipe.rollout.backend != "hf":
        update["vLLM asleep"] = CONTEXT
    elif sum(engine.values()) <= KEPT_SHARE * card:
        update["kept to sample"] = sum(engine.values())
    return Budget(update, held | engine | {"CUDA": CONTEXT}, {"AdamW": adamw_host})


def _weights(recipe: Recipe, shape: Shape) -> tuple[float, int, int]:
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


def _engine(recipe: Recipe, shape: Shape, card: float) -> dict[str, float]:
    """What generates takes while it does."""
    rollout = recipe.rollout
    if rollout.backend != "hf":
        return {"vLLM": rollout.vllm_gpu_memory_utilization * card}
    shares = recipe.model.lora is not None or recipe.model.weights == "bfloat16"
    tokens = recipe.data.max_prompt_length + rollout.max_completion_length
    most = rollout.max_batch_size * tokens * shape.kv_token
    bound = rollout.kv_cache_gb * 1e9 if rollout.kv_cache_gb else CACHE_SHARE * card
    return {"copy": shape.parameters * 2.0 * (not shares), "keys and values": float(min(most, bound))}


def card_of(hardware: str) -> float | None:
    """Bytes of the card that a header's ``hardware`` line names. Cards are sold by GiB; 80 GB are 85.5e9 bytes."""
    found = re.search(r"one GPU of (\d+) GB", hardware)
    return int(found[1]) * 2**30 * 0.995 if found else None
