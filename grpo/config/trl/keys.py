"""Every key that ``trl grpo`` and ``trl sft`` take, sorted by what becomes of it in a recipe."""

from __future__ import annotations

from typing import Any, NamedTuple

from grpo.config.hints import NOT_HERE, PREFIXES


class Carried(NamedTuple):
    """A key whose value goes to ``place`` as it is. ``default`` is TRL's; it is written out where ours is another."""

    place: str
    default: Any


CARRIED = {
    "model_name_or_path": Carried("model.name", None),
    "trust_remote_code": Carried("model.trust_remote_code", False),
    "gradient_checkpointing": Carried("model.gradient_checkpointing", True),
    "max_grad_norm": Carried("optimizer.max_grad_norm", 1.0),
    "weight_decay": Carried("optimizer.weight_decay", 0.0),
    "adam_beta1": Carried("optimizer.adam_beta1", 0.9),
    "adam_beta2": Carried("optimizer.adam_beta2", 0.999),
    "adam_epsilon": Carried("optimizer.adam_epsilon", 1e-8),
    "output_dir": Carried("training.output_dir", "trainer_output"),
    "seed": Carried("training.seed", 42),
    "run_name": Carried("tracking.run_name", None),
}
CARRIED_GRPO = {
    "learning_rate": Carried("optimizer.learning_rate", 1e-6),
    "disable_dropout": Carried("model.disable_dropout", False),
    "shuffle_dataset": Carried("data.shuffle", True),
    "num_generations": Carried("rollout.num_generations", 8),
    "temperature": Carried("rollout.temperature", 1.0),
    "top_p": Carried("rollout.top_p", 1.0),
    "top_k": Carried("rollout.top_k", 0),
    "min_p": Carried("rollout.min_p", None),
    "beta": Carried("algorithm.beta", 0.0),
    "num_iterations": Carried("algorithm.num_iterations", 1),
    "epsilon": Carried("algorithm.epsilon", 0.2),
    "sapo_temperature_neg": Carried("algorithm.sapo_temperature_neg", 1.05),
    "sapo_temperature_pos": Carried("algorithm.sapo_temperature_pos", 1.0),
    "vespo_k_pos": Carried("algorithm.vespo_k_pos", 2.0),
    "vespo_lambda_pos": Carried("algorithm.vespo_lambda_pos", 3.0),
    "vespo_k_neg": Carried("algorithm.vespo_k_neg", 3.0),
    "vespo_lambda_neg": Carried("algorithm.vespo_lambda_neg", 2.0),
    "mask_truncated_completions": Carried("algorithm.mask_truncated_completions", False),
    "off_policy_mask_threshold": Carried("algorithm.off_policy_mask_threshold", None),
    "top_entropy_quantile": Carried("algorithm.top_entropy_quantile", 1.0),
    "entropy_coef": Carried("algorithm.entropy_coef", 0.0),
    "use_adaptive_entropy": Carried("algorithm.use_adaptive_entropy", False),
    "entropy_coef_min": Carried("algorithm.entropy_coef_min", 0.0),
    "entropy_coef_max": Carried("algorithm.entropy_coef_max", 1.0),
    "entropy_coef_delta": Carried("algorithm.entropy_coef_delta", 0.005),
    "entropy_target": Carried("algorithm.entropy_target", 0.2),
}
CARRIED_SFT = {"learning_rate": Carried("optimizer.learning_rate", 2e-5)}
# Keys of an engine: carried over where ``use_vllm`` is true, and to engines of one mode only.
CARRIED_VLLM = {
    "vllm_server_timeout": ("server", Carried("rollout.vllm_server_timeout", 240.0)),
    "vllm_group_port": ("server", Carried("rollout.vllm_group_port", 51216)),
    "vllm_enable_sleep_mode": ("colocate", Carried("rollout.vllm_enable_sleep_mode", False)),
    "vllm_gpu_memory_utilization": ("colocate", Carried("rollout.vllm_gpu_memory_utilization", 0.3)),
    "vllm_max_model_length": ("colocate", Carried("rollout.vllm_max_model_length", None)),
    "vllm_tensor_parallel_size": ("colocate", Carried("rollout.vllm_tensor_parallel_size", 1)),
}

# Keys that only GRPO has a use for, with TRL's defaults; a function computes with each.
COMPUTED_GRPO: dict[str, Any] = {
    "reward_funcs": None,
    "reward_weights": None,
    "max_completion_length": 512,
    "generation_batch_size": None,
    "steps_per_generation": None,
    "num_generations_eval": None,
    "generation_kwargs": None,
    "chat_template_kwargs": None,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_model_impl": "vllm",
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_cap": None,
    "delta": None,
    "epsilon_high": None,
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
    "scale_rewards": "group",
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "use_bias_correction_kl": True,
    "max_tool_calling_iterations": None,
    "tools": None,  # this and the next TRL takes in code
    "environment_factory": None,
}
COMPUTED_SFT: dict[str, Any] = {"max_length": 1024}
COMPUTED: dict[str, Any] = {
    "loss_type": "dapo",  # `nll` with SFT
    # model
    "model_revision": "main",
    "dtype": "float32",
    "torch_dtype": None,
    "router_aux_loss_coef": None,
    "bf16": None,
    "fp16": False,
    "attn_implementation": None,
    "model_init_kwargs": None,
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "use_rslora": False,
    "load_in_4bit": False,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": False,
    # data
    "dataset_name": None,
    "dataset_config": None,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "datasets": [],
    "dataset_prompt_column": None,  # of alignment-handbook's and open-r1's scripts, as is the next
    "system_prompt": None,
    "max_prompt_length": None,  # TRL's until 0.28
    # batch and length
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "warmup_ratio": None,  # transformers' until 5
    # rhythm
    "eval_strategy": "no",
    "eval_steps": None,
    "eval_on_start": False,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "ddp_timeout": 1800,
    "report_to": "none",
    "project": "huggingface",
}

_EVERY_STEP = "every step is logged, to metrics.jsonl and every tracker"
_ROLLOUTS = "every completion is written to rollouts/; training.log_rollouts_every thins them"
_LOADER = "there is no data loader: rows stay in memory, and tokens are made once"
_PRECISION = "model.dtype is the compute type, in training and evaluation"
_LAUNCH = NOT_HERE["deepspeed"]
_PUSH = "leave it out; `grpo push OUTPUT_DIR REPO` sends final/ when the run is done"
_COMPILE = "torch.compile is not used; kernels are chosen by model.kernels"
_LORA = "adapters are low-rank ones on linear layers: model.lora has r, lora_alpha, lora_dropout, target_modules"
_STREAM = "rows are read whole, so that a run draws the same ones again; save a part of the data as a file (data.path)"
_BEST = "final/ is the last step's model; checkpoints are the newest training.save_total_limit"
_SFT_ROWS = (
    "rows have a prompt and a completion (data.prompt_column, data.completion_column); only the latter is learned"
)

NO_PLACE = {
    **{name: NOT_HERE[name] for name in ("load_in_8bit", "use_liger_kernel", "per_device_eval_batch_size")},
    **{name: NOT_HERE[name] for name in ("repetition_penalty", "cache_implementation")},
    **{name: NOT_HERE[name] for name in ("vllm_structured_outputs_regex", "resume_from_checkpoint", "packing")},
    **{name: NOT_HERE[name] for name in ("completion_only_loss", "assistant_only_loss", "deepspeed")},
    "reward_model_name_or_path": NOT_HERE["reward_model"],
    **dict.fromkeys(("dataset_streaming", "streaming"), _STREAM),
    "test_split_size": "data.eval_size is the number of rows to hold out, not their share",
    "ignore_bias_buffers": "replicas are not held by torch's DDP, so its buffers need no exception",
    "config": "it names this file",
    "env": "set the variables in the shell that starts grpo",
    # GRPOConfig
    "cast_lm_head_to_fp32": "leave it out: model.kernels: auto computes logits in float32 on a GPU",
    "remove_unused_columns": "every column of a row reaches the reward functions",
    "ds3_gather_for_generation": _LAUNCH,
    "pad_to_multiple_of": "rows are put together by tokens, most of them without padding",
    "log_completions": _ROLLOUTS,
    "log_multimodal": "prompts are text",
    "num_completions_to_print": _ROLLOUTS,
    "log_unique_prompts": _ROLLOUTS,
    "log_completions_hub_repo": _ROLLOUTS,
    **dict.fromkeys(
        ("use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged"),
        "rollout.backend: hf batches continuously by itself; rollout.kv_cache_gb and max_batch_size bound it",
    ),
    # ModelConfig
    **dict.fromkeys(("lora_target_parameters", "lora_modules_to_save", "lora_task_type", "use_dora"), _LORA),
    "bnb_4bit_quant_storage": "4-bit weights are held as bitsandbytes holds them by default",
    # SFTConfig
    "chat_template_path": "the template is the tokenizer's: model.tokenizer names another one",
    "dataset_text_field": _SFT_ROWS,
    "dataset_kwargs": "rows are always prepared here",
    "dataset_num_proc": _LOADER,
    "eos_token": "the model's own ends a completion; model.tokenizer names another tokenizer",
    "pad_token": "padding has no token of its own here",
    "truncation_mode": "a row that is too long is refused or dropped (data.too_long), never cut",
    **dict.fromkeys(("packing_strategy", "padding_free", "eval_packing"), NOT_HERE["packing"]),
    "activation_offloading": "model.gradient_checkpointing keeps least; nothing is moved to the host",
    # TrainingArguments
    **dict.fromkeys(("optim_args", "optim_target_modules"), "optimizer.optim is AdamW; its settings are keys"),
    "average_tokens_across_devices": "leave it out: every denominator is counted over all processes",
    "label_smoothing_factor": "not supported: the loss is of the tokens themselves",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), _PRECISION),
    "tf32": "set torch's own switch in the environment (NVIDIA_TF32_OVERRIDE)",
    "gradient_checkpointing_kwargs": "checkpoints are always of the kind that is not reentrant",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILE),
    "liger_kernel_config": "model.kernels: [liger] takes norms and gated MLPs",
    "use_cache": "generation holds keys and values, training does not",
    "neftune_noise_alpha": "not supported: noise on embeddings makes another policy than the one that samples",
    "torch_empty_cache_steps": "leave it out: memory is sized before each step",
    "auto_find_batch_size": "leave it out: micro-batches are halved by themselves where memory runs out",
    **dict.fromkeys(("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"), _EVERY_STEP),
    "logging_dir": NOT_HERE["logging_dir"],
    **dict.fromkeys(("log_on_each_node", "log_level", "log_level_replica"), "the first process of each node speaks"),
    "disable_tqdm": "a screen gets a progress bar, a file gets lines",
    "include_num_input_tokens_seen": "tokens are always counted",
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "tracking.trackio logs locally; trackio's own variables name a space",
    ),
    "eval_delay": "evaluation is every training.eval_every steps from the start",
    **dict.fromkeys(
        ("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        "evaluation samples and scores; it holds no logits",
    ),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics"), "evaluation has its own metrics, docs/recipe.md"),
    "save_only_model": "checkpoints are whole, so that a run resumes to the bit; final/ is the model alone",
    "save_on_each_node": "a checkpoint is written once, where training.output_dir is",
    "enable_jit_checkpoint": "leave it out: SIGTERM always saves before the run ends",
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(
        ("ignore_data_skip", "restore_callback_states_from_checkpoint"), "a resumed run draws what is next"
    ),
    "full_determinism": "leave it out: a run resumes to the same bits anyway",
    "data_seed": "training.seed is the root of every draw; data.args.seed is a task's own",
    "use_cpu": "the device is accelerate's: ACCELERATE_USE_CPU=true grpo train RECIPE",
    **dict.fromkeys(("accelerator_config", "parallelism_config"), _LAUNCH),
    **dict.fromkeys(
        (
            "dataloader_drop_last",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
            "train_sampling_strategy",
            "length_column_name",
            "label_names",
        ),
        _LOADER,
    ),
    **dict.fromkeys(("ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"), _LAUNCH),
    "debug": "set the library's own variable",
    "skip_memory_metrics": "peak memory is always in metrics.jsonl",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "grpo train trains, grpo eval evaluates"),
    "local_rank": "the launcher says it",
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _PUSH),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _PUSH),
    **dict.fromkeys(("fsdp", "fsdp_config", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"), PREFIXES["fsdp"]),
}

# TRL's defaults of keys without a place that are neither null, false, empty nor 0: at these a key says nothing.
DEFAULTS_WITHOUT_PLACE = {
    "repetition_penalty": 1.0,
    "ds3_gather_for_generation": True,
    "pad_to_multiple_of": "auto",
    "log_multimodal": True,
    "lora_task_type": "CAUSAL_LM",
    "dataset_text_field": "text",
    "truncation_mode": "keep_start",
    "packing_strategy": "bfd",
    "average_tokens_across_devices": True,
    "logging_strategy": "steps",
    "logging_steps": 10,
    "logging_nan_inf_filter": True,
    "log_on_each_node": True,
    "log_level": "passive",
    "log_level_replica": "warning",
    "include_num_input_tokens_seen": "no",
    "per_device_eval_batch_size": 8,
    "eval_do_concat_batches": True,
    "dataloader_pin_memory": True,
    "dataloader_in_order": True,
    "train_sampling_strategy": "random",
    "length_column_name": "length",
    "skip_memory_metrics": True,
    "hub_strategy": "every_save",
    "hub_token": "<HUB_TOKEN>",
    "local_rank": -1,
}

# Keys that say which of TRL's trainers a file is for.
ONLY_GRPO = {*CARRIED_GRPO, *CARRIED_VLLM, *COMPUTED_GRPO, "cast_lm_head_to_fp32", "log_completions"} - {
    "learning_rate",
    "shuffle_dataset",
}
ONLY_SFT = {
    *COMPUTED_SFT,
    *("packing", "packing_strategy", "padding_free", "eval_packing", "completion_only_loss", "assistant_only_loss"),
    *("dataset_text_field", "dataset_kwargs", "truncation_mode", "eos_token", "activation_offloading"),
}


def known_keys() -> set[str]:
    """Every key that some table has."""
    return {*CARRIED, *CARRIED_GRPO, *CARRIED_SFT, *CARRIED_VLLM, *COMPUTED, *COMPUTED_GRPO, *COMPUTED_SFT, *NO_PLACE}
