"""Tiny models of every architecture: transformers' own configuration, made small by the names that it has.

``CASES`` are the rows of docs/models.md. Most need no settings of their own. Windows and chunks are 8 tokens, and rope
was made for 32, so that the rows of ``measure`` go beyond them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    # experts
    "moe_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    # recurrent layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "state_size": 8,
    # other names
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 64,
    "n_positions": 256,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "d_model": 64,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
BEYOND = LONGROPE | {"original_max_position_embeddings": 32}


class Case(NamedTuple):
    kind: str  # transformers' name of the architecture
    settings: dict[str, Any]
    note: str  # what of the architecture is meant


def case(kind: str, note: str = "", **settings: Any) -> Case:
    return Case(kind, settings, note)


SHORT_ROPE = {"max_position_embeddings": 32, "rope_parameters": DYNAMIC}
STATES = {"state_size": 8, "n_groups": 1, "chunk_size": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
ZAMBA = {"num_hidden_layers": 4, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8}
ZAMBA |= {"num_mem_blocks": 1, "attention_head_dim": 64, "attention_hidden_size": 128}
PER_LAYER = {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 5}
PER_LAYER |= {"intermediate_size": [64] * 5, "hidden_size_per_layer_input": 16, "laurel_rank": 8}
LATENT = {"num_key_value_heads": 2, "head_dim": 16}

# Without settings of their own.
PLAIN = """
    afmoe apertus arcee aria_text bart bert biogpt bitnet bloom cohere cohere2 cohere2_moe cpmant ctrl deepseek_v4 doge
    ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode
    gpt_neox gpt_neox_japanese gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text
    hy_v3 hy_v4 hyperclovax inkling_text jais2 jetmoe laguna llama llama4_text mellum mimo_v2_flash minicpm3
    minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mpt nanochat nemotron nemotron_h olmo
    olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next recurrent_gemma roberta rwkv seed_oss smollm3 solar_open stablelm starcoder2
    vaultgemma xglm xlm falcon_mamba mamba hunyuan_v1_dense hunyuan_v1_moe cwm modernbert-decoder gemma4_text
"""
CASES = [
    *(case(kind) for kind in PLAIN.split()),
    case("llama", "llama3 rope", rope_parameters=LLAMA3),
    case("llama", "linear rope", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    case("qwen2", "yarn rope", rope_parameters=YARN),
    case("llama", "dynamic rope", rope_parameters=DYNAMIC),
    case("llama", "dynamic rope, rows beyond it", **SHORT_ROPE),
    case("phi3", "longrope", rope_parameters=LONGROPE, original_max_position_embeddings=64),
    case("phi3", "longrope, rows beyond it", rope_parameters=BEYOND, original_max_position_embeddings=32),
    case("phi3", "sliding window", sliding_window=8),
    case(
        "qwen2",
        "sliding window",
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    case("gpt2", "dropout 0.3", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3),
    case("opt", "layerdrop 0.5", layerdrop=0.5),
    case("mixtral", "router noise", router_jitter_noise=0.3),
    case("deepseek_v2", **LATENT, num_experts_per_tok=2),
    *(
        case(kind, **LATENT)
        for kind in ("deepseek_v3", "kimi_linear", "glm4_moe_lite", "longcat_flash", "youtu", "axk1")
    ),
    *(case(kind, num_key_value_heads=2) for kind in ("deepseek_v32", "glm_moe_dsa", "axk2")),
    case("diffllama", num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    case("falcon", new_decoder_architecture=True),
    case("falcon", "multi-query", multi_query=True),
    case("falcon", "alibi", alibi=True),
    case("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]], window_size=8),
    case("gptj", rotary_dim=16),
    case("codegen", rotary_dim=16, n_head=4),
    case("lfm2", layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    case("lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1),
    case("mamba2", num_heads=4, head_dim=32, **STATES),
    case("falcon_h1", mamba_d_ssm=64, mamba_d_head=16, **MAMBA),
    case("bamba", attn_layer_indices=[1], mamba_d_head=32, **MAMBA),
    case("dots1", n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    case("gemma3n_text", layer_types=["sliding_attention"] * 4 + ["full_attention"], **PER_LAYER),
    case("granitemoehybrid", layer_types=["linear_attention", "full_attention"]),
    case("jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    case("zamba2", layers_block_type=["mamba", "mamba", "hybrid", "mamba"], **ZAMBA),
]


def config_of(case: Case, vocab_size: int) -> PreTrainedConfig:
    """The case's configuration, small, with a layer of each kind that the architecture has."""
    text = AutoConfig.for_model(case.kind).get_text_config(decoder=True)
    settings = {name: value for name, value in SMALL.items() if _has(text, name)}
    settings |= {"vocab_size": vocab_size, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or []))
    name = type(text).attribute_map.get("layer_types", "layer_types")
    own = not isinstance(getattr(type(text), name, None), property)  # else it follows from other settings
    if kinds and own and name not in case.settings:
        settings["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
    settings |= case.settings
    settings.setdefault("num_hidden_layers", max(2, len(settings.get("layer_types", ()))))
    return type(text)(**settings)


def _has(config: PreTrainedConfig, name: str) -> bool:
    """Whether a configuration has this setting, and not as something that it works out itself."""
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        value = getattr(config, name)
    except Exception:  # Gemma 4: one that layers differ in
        return False
    return value is not None or name in ("head_dim", "num_key_value_heads")
