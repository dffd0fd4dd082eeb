"""What each key of the recipe means to a run that resumes: may its value differ from that in the checkpoint?

``free``: nothing that is computed depends on it. ``warns``: the run goes on, and a line says that it is no longer equal
to the bit to the one that was not interrupted. ``refused``: it would be another run. Every key is in one of the tables,
which a test holds; docs/recipe.md shows it. ``run/same_run.py`` compares.
"""

from __future__ import annotations

from typing import Literal

Meaning = Literal["free", "warns", "refused"]

# Sections by their dotted names, the recipe's own keys under "".
FREE = {
    "": "expect",
    "rewards": "timeout shaping",
    "environment": "timeout memory_limit_gb",
    "teacher": "url timeout",
    "data.mix.rewards": "timeout shaping",
    "rollout": """vllm_server_base_url vllm_server_timeout vllm_start_timeout vllm_generation_timeout vllm_sync_timeout
        vllm_weight_transfer vllm_sync_dir vllm_group_host vllm_group_port vllm_gpu_memory_utilization
        vllm_enable_sleep_mode vllm_probe_tolerance vllm_python""",
    "optimizer": "offload",
    "scoring": "workers timeout memory_limit_gb environment max_failure_rate max_unscorable_rows",
    "evaluation": "num_generations temperature top_p max_completion_length at_start suites suites_every suite_sampling",
    "evaluation.suite_sampling": "num_generations temperature top_p max_completion_length rows",
    # The learning rate may depend on max_steps: `run/run.py` says so where it does.
    "training": """output_dir max_steps max_seconds eval_every save_every save_best patience save_total_limit
        log_rollouts_every ddp_timeout peer_timeout replica_check_every dollars_per_hour
        num_threads""",  # threads in use are compared
    "health": """no_signal all_alike never_correct accuracy_below_start reward_without_accuracy length_collapse
        entropy_collapse cut_off kl_blow_up clipped sampler_mismatch gradient slow_reward unscored max_rollbacks""",
    "expect": "metric step low high source",
    "tracking": "project run_name wandb tensorboard trackio",
}
# Rounding alone, or what one must be able to change in a run that does not go well: its learning rate, what fits into
# memory, where the engine is.
WARNS = {
    "model": "attn_implementation kernels gradient_checkpointing",
    "environment": "overlap_steps",
    "rollout": """max_batch_size kv_cache_gb vllm_mode vllm_max_model_length vllm_tensor_parallel_size vllm_dtype
        vllm_lora_sync vllm_args""",
    "optimizer": "learning_rate max_grad_norm lr_scheduler_type lr_min_ratio warmup_steps",
    "evaluation": "reward",  # the curriculum may go by it
    "training": "micro_batch_tokens micro_batch_size",
}
# The problem, the model, the method, and what a checkpoint's state is shaped by (AdamW's own numbers are part of it).
REFUSED = {
    "": """stage model data rewards environment teacher rollout prompts algorithm optimizer scoring evaluation training
        health tracking""",  # as such
    "model": "name dtype weights load_in_4bit lora tokenizer revision trust_remote_code disable_dropout",
    "model.lora": "r lora_alpha lora_dropout target_modules",
    "data": """name path hub args template system_prompt chat_template_kwargs prompt_column completion_column
        max_prompt_length too_long train_size eval_size eval_path shuffle chat_template_date mix""",
    "data.mix": """name path hub args template system_prompt chat_template_kwargs prompt_column completion_column
        train_size eval_size eval_path chat_template_date label weight rewards""",
    "data.mix.rewards": "name path weight args needs_group",
    "rewards": "name path weight args needs_group",
    "environment": "name path tools args max_turns max_turn_length max_observation_length tool_format",
    "teacher": """name column coef text_coef divergence jsd_beta whole_sequence top_k dtype tokenizer revision
        trust_remote_code""",
    "rollout": """backend num_generations max_completion_length temperature top_p top_k min_p stop max_staleness""",
    "prompts": """dynamic_sampling max_resample replay_groups curriculum curriculum_floor curriculum_newest""",
    "algorithm": """loss_type beta kl_estimator kl_in_reward use_bias_correction_kl epsilon epsilon_high delta
        importance_sampling_level off_policy_mask_threshold top_entropy_quantile entropy_coef use_adaptive_entropy
        entropy_target entropy_coef_delta entropy_coef_min entropy_coef_max sapo_temperature_pos sapo_temperature_neg
        vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg clip_cov_ratio clip_cov_lb clip_cov_ub kl_cov_ratio
        ppo_kl_coef num_iterations num_minibatches scale_rewards baseline multi_objective_aggregation pass_at_k credit
        mask_truncated_completions sync_ref_model ref_model_sync_steps ref_model_mixup_alpha importance_sampling_mode
        importance_sampling_clip_max importance_sampling_clip_min router_aux_loss_coef router_bias_update_rate""",
    "optimizer": "optim weight_decay adam_beta1 adam_beta2 adam_epsilon",
    "training": "prompts_per_step seed",
}

TABLES: dict[Meaning, dict[str, str]] = {"free": FREE, "warns": WARNS, "refused": REFUSED}
MEANINGS: dict[str, Meaning] = {
    f"{section}.{key}".lstrip("."): meaning
    for meaning, table in TABLES.items()
    for section, keys in table.items()
    for key in keys.split()
}


def on_resume(key: str) -> Meaning:
    """Of a key of the recipe, ``rewards.0.timeout``; also of one inside its value, and of one that is gone."""
    parts = [part for part in key.split(".") if not part.isdecimal()]  # places in a list
    for end in range(len(parts), 0, -1):
        if meaning := MEANINGS.get(".".join(parts[:end])):
            return meaning
    return "refused"
