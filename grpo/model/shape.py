"""A model's shape: its number of weights and what a token takes, from config.json alone, without torch.

Counts are those of Llama-shaped models: attention with grouped queries, or over latents (DeepSeek-V3's MLA), and a
gated MLP, or several as experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config.find import locate
from grpo.errors import UserError

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "qwen3_moe", "mixtral", "deepseek_v3")
"""``model_type`` of the models that are counted."""


@dataclass(frozen=True)
class Latent:
    """Attention over latents (DeepSeek-V2, arXiv:2405.04434): queries come from ``q_rank`` numbers (None: from the
    hidden state), keys and values from ``kv_rank``, and ``rope`` numbers of a key are of all heads. A value has
    ``value`` numbers."""

    q_rank: int | None
    kv_rank: int
    rope: int
    value: int

    def linears(self, hidden: int, heads: int, head_dim: int) -> list[tuple[int, int, int]]:
        """(inputs, outputs, how many) of a layer's: queries, latents, keys and values, output."""
        q, nope = heads * head_dim, head_dim - self.rope
        queries = [(hidden, q, 1)] if self.q_rank is None else [(hidden, self.q_rank, 1), (self.q_rank, q, 1)]
        keys = [(hidden, self.kv_rank + self.rope, 1), (self.kv_rank, heads * (nope + self.value), 1)]
        return [*queries, *keys, (heads * self.value, hidden, 1)]


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model, by transformers' names: queries have ``heads``, keys and values ``kv_heads``.

    Where there are experts, ``mlp`` is the width of one. The first ``dense_layers`` have a single MLP of width
    ``dense_mlp`` instead; ``shared_mlp`` is the width of the experts that every token goes to besides.
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    biases: bool = True  # of queries, keys and values, as Qwen2.5 has them
    tied: bool = True  # the head's weight is the embedding's
    head_norms: bool = False  # of queries and keys, as Qwen3 has them
    experts: int = 1
    experts_of_token: int = 1
    dense_layers: int = 0
    dense_mlp: int = 0
    shared_mlp: int = 0
    latent: Latent | None = None

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def linears(self) -> int:
        """Weights of the linear layers but the head: what 4 bits hold, and what LoRA adds to."""
        return sum(i * o * count for i, o, count in self._linears(self.experts))

    @property
    def parameters(self) -> int:
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim * self.biases
        norms = 2 * self.hidden + 2 * self.head_dim * self.head_norms
        if self.latent is not None:
            biases, norms = 0, norms + self.latent.kv_rank + (self.latent.q_rank or 0)
        routers = self.hidden * self.experts * (self.experts > 1) * (self.layers - self.dense_layers)
        embeddings = self.embedding * (1 if self.tied else 2)
        return embeddings + self.linears + self.layers * (biases + norms) + routers + self.hidden

    @property
    def active_parameters(self) -> int:
        """Of them, those that one token is computed with: of the experts, the ones that it goes to."""
        return self.parameters - self.linears + self.products_of_token

    @property
    def products_of_token(self) -> int:
        """Weights that a token is multiplied with in all layers, the head left out."""
        return sum(i * o * count for i, o, count in self._linears(self.experts_of_token))

    @property
    def attention_width(self) -> float:
        """Numbers of a token's queries, and of what attention gives it, in all heads: the mean of both."""
        value = self.head_dim if self.latent is None else self.latent.value
        return self.heads * (self.head_dim + value) / 2

    @property
    def kv_token(self) -> int:
        """Bytes of a token's keys and values in bfloat16, of every head where they are made from latents."""
        if self.latent is not None:
            return 2 * self.layers * self.heads * (self.head_dim + self.latent.value)
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def kv_token_of_vllm(self) -> int:
        """The same in vLLM, which holds latents as they are."""
        return self.kv_token if self.latent is None else 2 * self.layers * (self.latent.kv_rank + self.latent.rope)

    def adapters(self, r: int) -> int:
        return sum(r * (i + o) * count for i, o, count in self._linears(self.experts))

    def matrices(self, r: int | None) -> list[int]:
        """Elements of each trained matrix: of all, or of adapters of rank ``r``."""
        linears = [(i, o) for i, o, count in self._linears(self.experts) for _ in range(count)]
        if r is not None:
            return [r * size for linear in linears for size in linear]
        return [self.embedding] * (1 if self.tied else 2) + [i * o for i, o in linears]

    def kept_token(self, *, checkpointing: bool, size: int = 2) -> float:
        """Bytes a token keeps for the backward pass: the float32 residual between layers, and of every layer what
        ``kernels.lean_activations`` leaves (its doc string counts it), ``size`` bytes a number. With checkpointing only
        the layer that is just computed again keeps any, but all."""
        residual = 4 * self.hidden * (self.layers + 2)
        keys, mlp = self.kv_heads * self.head_dim, self.mlp * self.experts_of_token + self.shared_mlp
        if checkpointing:
            return residual + size * (8 * self.hidden + 2 * keys + 4 * max(mlp, self.dense_mlp))
        mlps = mlp * (self.layers - self.dense_layers) + self.dense_mlp * self.dense_layers
        return residual + size * (self.layers * (4 * self.hidden + 2 * keys) + 2 * mlps)

    def _linears(self, experts: int) -> list[tuple[int, int, int]]:
        """(inputs, outputs, how many) of the linear layers: queries, keys and values, output; gate and up, down."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(h, q, 1), (h, kv, 1), (h, kv, 1), (q, h, 1)]
        if self.latent is not None:
            attention = self.latent.linears(h, self.heads, self.head_dim)
        sparse = self.layers - self.dense_layers
        mlps = [(self.mlp, experts * sparse), (self.shared_mlp, sparse), (self.dense_mlp, self.dense_layers)]
        found = [(i, o, count * self.layers) for i, o, count in attention]
        return found + [part for m, n in mlps if m * n for part in ((h, m, 2 * n), (m, h, n))]


QWEN = {
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936),
    "qwen2.5-3b": Shape(36, 2048, 11008, 16, 2, 128, 151936),
    "r1-distill-qwen-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936, tied=False),
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8, 128, 151936, biases=False, head_norms=True),
    "qwen3-1.7b": Shape(28, 2048, 6144, 16, 8, 128, 151936, biases=False, head_norms=True),
}


def shape_of(name: str) -> Shape | None:
    """The shape of the model that a hub id, a path or a recipe's name speaks of, if it is known here."""
    return next((shape for known, shape in QWEN.items() if known in name.lower()), None)


def find_shape(name: str, *, key: str = "model.name", option: str = "--config") -> Shape:
    """The shape of ``model.name``, or of what another ``key`` names: from the folder's config.json, or of a model that
    is known by its name.

    Raises UserError where neither is at hand, or where the model is not Llama-shaped.
    """
    file = Path(locate(name))
    file = file / "config.json" if file.is_dir() else file
    if file.is_file():
        try:
            return shape_from(json.loads(file.read_text(encoding="utf-8")), str(file))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read as a model's configuration: {error}") from None
    if shape := shape_of(name):
        return shape
    raise UserError(
        f"{key}: {name} is no folder with a config.json, and none of {', '.join(QWEN)}, whose shapes are known. "
        f"Give the config.json of the model: {option} FILE"
    )


def shape_from(config: Mapping[str, Any], source: str) -> Shape:
    """Raises UserError where ``config`` is of a model that is not Llama-shaped, or lacks a number."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"{source}: a model of type {kind} is not one whose memory is counted ({known})")
    try:
        if kind == "deepseek_v3":
            return _deepseek_v3(config)
        heads = config["num_attention_heads"]
        experts = config.get("num_experts") or config.get("num_local_experts") or 1
        return Shape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            mlp=config["moe_intermediate_size"] if "moe_intermediate_size" in config else config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            biases=kind.startswith("qwen2") or bool(config.get("attention_bias")),
            tied=bool(config.get("tie_word_embeddings")),
            head_norms=kind.startswith("qwen3"),
            experts=experts,
            experts_of_token=config.get("num_experts_per_tok", 1) if experts > 1 else 1,
        )
    except KeyError as missing:
        raise UserError(f"{source}: has no {missing.args[0]}") from None


def _deepseek_v3(config: Mapping[str, Any]) -> Shape:
    """Raises KeyError where a number is missing."""
    heads, rope = config["num_attention_heads"], config["qk_rope_head_dim"]
    latent = Latent(config.get("q_lora_rank"), config["kv_lora_rank"], rope, config["v_head_dim"])
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        mlp=config["moe_intermediate_size"],
        heads=heads,
        kv_heads=heads,
        head_dim=config["qk_nope_head_dim"] + rope,
        vocabulary=config["vocab_size"],
        biases=False,
        tied=bool(config.get("tie_word_embeddings")),
        experts=config["n_routed_experts"],
        experts_of_token=config["num_experts_per_tok"],
        dense_layers=min(config["first_k_dense_replace"], config["num_hidden_layers"]),
        dense_mlp=config["intermediate_size"],
        shared_mlp=config["moe_intermediate_size"] * config["n_shared_experts"],
        latent=latent,
    )
