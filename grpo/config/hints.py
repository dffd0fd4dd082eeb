"""What an unknown key probably meant: a key of ours elsewhere, a name of TRL, verl or OpenRLHF, or a typing slip."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any, get_args

from pydantic.fields import FieldInfo

from grpo.config.recipe import Recipe, Section
from grpo.config.vllm import VllmOptions

# Names of TRL (and transformers' TrainingArguments), verl and OpenRLHF with their place here; after ": ", what differs.
RENAMED = {
    # model
    "model_name_or_path": "model.name",
    "model_name": "model.name",
    "model.path": "model.name",
    "pretrain": "model.name",
    "torch_dtype": "model.dtype",
    "model_revision": "model.revision",
    "teacher_model_name_or_path": "teacher.name",
    "teacher_model": "teacher.name",
    "teacher_model_path": "teacher.name",
    "teacher_model_revision": "teacher.revision",
    "tokenizer_name_or_path": "model.tokenizer",
    "enable_gradient_checkpointing": "model.gradient_checkpointing",
    "flash_attn": "model.attn_implementation: flash_attention_2",
    "load_in_4bit": "model.load_in_4bit: with `model.lora`",
    "quantization": "model.load_in_4bit: true, with `model.lora`",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_target_modules": "model.lora.target_modules",
    # data
    "dataset_name": "data.hub: or `data.path` for a file, `data.name` for a built-in task",
    "dataset_config": "data.args: {name: ...}",
    "dataset_train_split": "data.args: {split: ...}",
    "dataset_prompt_column": "data.prompt_column",
    "dataset_text_field": "data.completion_column: what is imitated, with `data.prompt_column` before it",
    "prompt_data": "data.path: or `data.hub`",
    "train_files": "data.path",
    "val_files": "data.eval_path",
    "eval_dataset": "data.eval_path",
    "input_key": "data.prompt_column",
    "prompt_key": "data.prompt_column",
    "label_key": "data.completion_column: with stage sft; with stage grpo every column reaches the reward functions",
    "prompt_max_len": "data.max_prompt_length",
    "max_prompt_length": "data.max_prompt_length",
    "max_samples": "data.train_size",
    "shuffle_dataset": "data.shuffle",
    "apply_chat_template": "data.template: chat",
    "input_template": "data.template",
    # rewards
    "reward_funcs": "rewards: a list of {name: ...} or {path: file.py:function}",
    "reward_weights": "rewards: each with its own weight",
    # environment
    "tools": "environment.tools: a list of file.py:function",
    "environment_factory": "environment.path: file.py:Class",
    "env": "environment: {name: ...} for a built-in, {path: file.py:Class} for your own",
    "max_tool_calling_iterations": "environment.max_turns: one more, the turn after the last call included",
    "max_assistant_turns": "environment.max_turns",
    "max_user_turns": "environment.max_turns: turns of the model",
    "max_tool_response_length": "environment.max_observation_length: tokens",
    "tool_config_path": "environment.tools: a list of file.py:function",
    "tool_response_truncate_side": "environment.max_observation_length: a longer answer is cut in the middle",
    # rollout
    "n": "rollout.num_generations",
    "n_samples_per_prompt": "rollout.num_generations",
    "max_response_length": "rollout.max_completion_length",
    "generate_max_len": "rollout.max_completion_length",
    "max_new_tokens": "rollout.max_completion_length",
    "micro_rollout_batch_size": "rollout.max_batch_size: sequences decoded at once",
    "rollout.name": "rollout.backend",
    # rollout with vLLM: our own names, anywhere or in a section `vllm`, then those of others
    **{name: f"rollout.{name}" for name in VllmOptions.model_fields},
    **{name.replace("_", ".", 1): f"rollout.{name}" for name in VllmOptions.model_fields},
    "vllm_server_host": "rollout.vllm_server_base_url: http://HOST:PORT",
    "vllm_server_port": "rollout.vllm_server_base_url: http://HOST:PORT",
    "vllm_max_model_len": "rollout.vllm_max_model_length",
    "vllm_model_impl": 'rollout.vllm_args: ["--model-impl=..."]',
    "vllm_enable_prefix_caching": 'rollout.vllm_args: ["--enable-prefix-caching"]',
    "vllm_enable_sleep": "rollout.vllm_enable_sleep_mode",
    "vllm_sync_backend": "rollout.vllm_weight_transfer",
    "vllm_num_engines": "rollout.vllm_server_base_url: a list with every server's URL",
    "colocate_all_models": "rollout.vllm_mode: colocate",
    "async_train": "rollout.max_staleness: steps that sampling may be ahead; 1 at least",
    "overlap": "rollout.max_staleness: 1 is what `overlap: true` was, 0 what false was",
    "max_head_offpolicyness": "rollout.max_staleness",
    "max_async_level": "rollout.max_staleness",
    "staleness_threshold": "rollout.max_staleness: whole steps, not a share of one",
    "gpu_memory_utilization": "rollout.vllm_gpu_memory_utilization",
    "tensor_model_parallel_size": "rollout.vllm_tensor_parallel_size",
    "free_cache_engine": "rollout.vllm_enable_sleep_mode",
    "max_model_len": "rollout.vllm_max_model_length",
    "enforce_eager": 'rollout.vllm_args: ["--enforce-eager"]',
    "max_num_seqs": 'rollout.vllm_args: ["--max-num-seqs=..."]',
    "max_num_batched_tokens": 'rollout.vllm_args: ["--max-num-batched-tokens=..."]',
    # algorithm
    "kl_coef": "algorithm.beta",
    "init_kl_coef": "algorithm.beta",
    "kl_loss_coef": "algorithm.beta",
    "use_kl_loss": "algorithm.beta: 0 turns the KL penalty off; `algorithm.kl_in_reward` says where it is",
    "use_kl_in_reward": "algorithm.kl_in_reward",
    "kl_loss_type": "algorithm.kl_estimator: k1 (kl), k2 (mse) or k3 (low_var_kl)",
    "kl_penalty": "algorithm.kl_estimator: k1 (kl), k2 (mse) or k3 (low_var_kl)",
    "entropy_coeff": "algorithm.entropy_coef",
    "entropy_loss_coef": "algorithm.entropy_coef",
    "policy_loss.loss_mode": "algorithm.loss_type",
    "loss_mode": "algorithm.loss_type",
    "clip_cov_lower_bound": "algorithm.clip_cov_lb",
    "clip_cov_upper_bound": "algorithm.clip_cov_ub",
    "kl_cov_coef": "algorithm.ppo_kl_coef",
    "clip_ratio": "algorithm.epsilon",
    "clip_ratio_low": "algorithm.epsilon",
    "clip_ratio_high": "algorithm.epsilon_high",
    "clip_ratio_c": "algorithm.delta",
    "eps_clip": "algorithm.epsilon",
    "eps_clip_low_high": "algorithm.epsilon: and `algorithm.epsilon_high`",
    "cliprange": "algorithm.epsilon",
    "ppo_epochs": "algorithm.num_iterations",
    "max_epochs": "algorithm.num_iterations: passes over a rollout; the run's length is `training.max_steps`",
    "ppo_mini_batch_size": "algorithm.num_minibatches: their number, not their size",
    "loss_agg_mode": "algorithm.loss_type",
    "advantage_estimator": "algorithm.baseline: with `algorithm.scale_rewards`; or loss_type rloo or reinforce_pp",
    "adv_estimator": "algorithm.baseline: with `algorithm.scale_rewards`; or loss_type rloo or reinforce_pp",
    "vllm_importance_sampling_correction": "algorithm.importance_sampling_mode: none turns it off",
    "vllm_importance_sampling_mode": "algorithm.importance_sampling_mode",
    "vllm_importance_sampling_cap": "algorithm.importance_sampling_clip_max",
    "vllm_importance_sampling_clip_max": "algorithm.importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min": "algorithm.importance_sampling_clip_min",
    "enable_vllm_is_correction": "algorithm.importance_sampling_mode: none turns it off",
    "vllm_is_truncated_threshold": "algorithm.importance_sampling_clip_max: low is `importance_sampling_clip_min`",
    "tis_imp_ratio_cap": "algorithm.importance_sampling_clip_max",
    "norm_adv_by_std_in_grpo": "algorithm.scale_rewards: group or none",
    # prompts
    "filter_groups": "prompts.dynamic_sampling",
    "filter_groups.enable": "prompts.dynamic_sampling",
    "dynamic_filtering": "prompts.dynamic_sampling",
    "max_num_gen_batches": "prompts.max_resample: rounds after the first",
    "replay_buffer_size": "prompts.replay_groups: groups, not completions",
    # optimizer
    "lr": "optimizer.learning_rate",
    "actor_learning_rate": "optimizer.learning_rate",
    "grad_clip": "optimizer.max_grad_norm",
    "max_norm": "optimizer.max_grad_norm",
    "warmup_ratio": "optimizer.warmup_steps: steps, not a share of them",
    "lr_warmup_ratio": "optimizer.warmup_steps: steps, not a share of them",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "lr_warmup_steps_ratio": "optimizer.warmup_steps: steps, not a share of them",
    "lr_scheduler": "optimizer.lr_scheduler_type",
    "warmup_style": "optimizer.lr_scheduler_type",
    "min_lr_ratio": "optimizer.lr_min_ratio",
    "lr_scheduler_kwargs": "optimizer.lr_min_ratio",
    "adam_offload": "optimizer.offload",
    "optimizer_offload": "optimizer.offload",
    "adam_betas": "optimizer.adam_beta1: and `optimizer.adam_beta2`",
    # training
    "per_device_train_batch_size": "training.prompts_per_step: prompts over all processes; memory is set by "
    "`training.micro_batch_tokens`",
    "gradient_accumulation_steps": "training.micro_batch_tokens: accumulation follows from it; the step's size is "
    "`training.prompts_per_step`",
    "generation_batch_size": "training.prompts_per_step: prompts, not completions",
    "steps_per_generation": "algorithm.num_minibatches: optimizer steps a rollout is split into",
    "rollout_batch_size": "training.prompts_per_step",
    "train_batch_size": "training.prompts_per_step: prompts a step; `algorithm.num_minibatches` splits them",
    "micro_train_batch_size": "training.micro_batch_size: or `training.micro_batch_tokens`",
    "ppo_micro_batch_size": "training.micro_batch_size: or `training.micro_batch_tokens`",
    "ppo_micro_batch_size_per_gpu": "training.micro_batch_size: or `training.micro_batch_tokens`",
    "ppo_max_token_len_per_gpu": "training.micro_batch_tokens",
    "num_train_epochs": "training.max_steps: steps, not epochs; an epoch is rows / `training.prompts_per_step` steps",
    "num_episodes": "training.max_steps: steps, not epochs",
    "total_epochs": "training.max_steps: steps, not epochs",
    "total_training_steps": "training.max_steps",
    "save_steps": "training.save_every",
    "save_freq": "training.save_every",
    "save_strategy": "training.save_every: in steps; 0 saves at the end only",
    "eval_steps": "training.eval_every",
    "test_freq": "training.eval_every",
    "eval_strategy": "training.eval_every: in steps; 0 evaluates at the start and end only",
    "eval_on_start": "evaluation.at_start",
    "val_before_train": "evaluation.at_start",
    "default_local_dir": "training.output_dir",
    "save_path": "training.output_dir",
    "ckpt_path": "training.output_dir",
    "max_ckpt_num": "training.save_total_limit",
    "log_completions": "training.log_rollouts_every",
    "num_generations_eval": "evaluation.num_generations",
    "n_samples_per_eval_prompt": "evaluation.num_generations",
    # tracking
    "report_to": "tracking.wandb: offline or online; also `tracking.tensorboard`, `tracking.trackio`",
    "trainer.logger": "tracking.wandb: offline or online; also `tracking.tensorboard`, `tracking.trackio`",
    "project_name": "tracking.project",
    "experiment_name": "tracking.run_name",
    "use_wandb": "tracking.wandb: offline or online",
    "use_tensorboard": "tracking.tensorboard",
}

# Names with no place here, and what to do instead.
NOT_HERE = {
    "bf16": "set model.dtype: bfloat16",
    "fp16": "float16 is not supported; set model.dtype: bfloat16 or float32",
    "use_peft": "give model.lora a section, such as {r: 16}",
    "load_in_8bit": "8-bit weights are not supported; model.load_in_4bit with model.lora takes less",
    "bnb_4bit_quant_type": "leave it out: model.load_in_4bit is NF4",
    "use_bnb_nested_quant": "leave it out: with model.load_in_4bit scales are always quantized too",
    "use_vllm": "set rollout.backend: vllm, auto (vllm where it can be had) or hf",
    "vllm_device": "leave it out: an engine is on the devices of training (vllm_mode: colocate), or on those that "
    "CUDA_VISIBLE_DEVICES gave its server",
    "vllm_guided_decoding_regex": "not supported: it changes the sampling distribution",
    "vllm_structured_outputs_regex": "not supported: it changes the sampling distribution",
    "vllm_generate_batch_size": "leave it out: the engine batches what it is asked for; see rollout.vllm_args",
    "use_liger_loss": "leave it out: logprobs are always computed in chunks that never hold the logits",
    "use_liger_kernel": "leave it out: logprobs are always computed in chunks that never hold the logits",
    "logging_steps": "leave it out: every step is logged",
    "logging_dir": "leave it out: logs go to training.output_dir",
    "overwrite_output_dir": "a used folder is refused; choose another training.output_dir, or go on with --resume",
    "resume_from_checkpoint": "it is a switch: grpo train RECIPE --resume, or --resume-from PATH",
    "load_checkpoint": "it is a switch: grpo train RECIPE --resume",
    "per_device_eval_batch_size": "leave it out: rollout.max_batch_size bounds what is decoded at once",
    "eval_batch_size": "leave it out: rollout.max_batch_size bounds what is decoded at once",
    "repetition_penalty": "not supported: it changes the sampling distribution",
    "generation_kwargs": "not supported: rollout has temperature, top_p, top_k, min_p and stop",
    "cache_implementation": "leave it out: the backend chooses",
    "gamma": "leave it out: the advantage of a completion is the same at all its tokens",
    "lmbda": "with a `teacher`, stage: grpo distills on the student's own samples, stage: sft on the rows",
    "seq_kd": "sample from the teacher first, and train on its rows (stage: sft), with a `teacher` section or without",
    "critic": "GRPO has no critic; the baseline is the group (algorithm.baseline)",
    "critic_learning_rate": "GRPO has no critic; the baseline is the group (algorithm.baseline)",
    "lambd": "GRPO has no critic; the baseline is the group (algorithm.baseline)",
    "reward_model": "reward models are not supported; rewards takes functions",
    "reward_pretrain": "reward models are not supported; rewards takes functions",
    "remote_rm_url": "not supported; call the server from a function given as rewards: [{path: file.py:function}]",
    "packing": "leave it out: sequences are put together by training.micro_batch_tokens",
    "packing_samples": "leave it out: sequences are put together by training.micro_batch_tokens",
    "use_dynamic_bsz": "leave it out: micro-batches always follow training.micro_batch_tokens",
    "max_length": "lengths are data.max_prompt_length and rollout.max_completion_length",
    "completion_only_loss": "leave it out: with stage sft only the completion counts in the loss",
    "assistant_only_loss": "leave it out: with stage sft only the completion counts in the loss",
    "push_to_hub": "leave it out; grpo push OUTPUT_DIR REPO when the run is done",
    "zero_stage": "parallelism is accelerate's: accelerate launch --config_file ... -m grpo train RECIPE",
    "deepspeed": "parallelism is accelerate's: accelerate launch --config_file ... -m grpo train RECIPE",
    "nnodes": "processes are accelerate's: accelerate launch --num_machines ... -m grpo train RECIPE",
    "n_gpus_per_node": "processes are accelerate's: accelerate launch --num_processes ... -m grpo train RECIPE",
}
PREFIXES = {
    "fsdp": "parallelism is accelerate's: accelerate launch --config_file ... -m grpo train RECIPE",
    "ddp_b": "parallelism is accelerate's: accelerate launch --config_file ... -m grpo train RECIPE",
    "ddp_find_": "parallelism is accelerate's: accelerate launch --config_file ... -m grpo train RECIPE",
    "hub_": "leave it out; grpo push OUTPUT_DIR REPO when the run is done",
}


def section_in(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, alone, in a list or as an option; None for a plain value."""

    def find(annotation: Any) -> type[Section] | None:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation
        return next((found for part in get_args(annotation) if (found := find(part))), None)

    return find(field.annotation)


@cache
def sections() -> dict[str, type[Section]]:
    """Every section by its dotted name, in the order of the schema; the recipe itself is ``""``."""
    found: dict[str, type[Section]] = {}

    def walk(name: str, section: type[Section]) -> None:
        found[name] = section
        for key, field in section.model_fields.items():
            if inner := section_in(field):
                walk(f"{name}.{key}" if name else key, inner)

    walk("", Recipe)
    return found


LISTS = ("rewards", "expect", "data.mix", "data.mix.rewards")  # their keys need a number: rewards.0.weight


def places(key: str) -> list[str]:
    """The dotted keys that an undotted name may mean: those of that name, or what another project's name is here."""
    named = [f"{name}.{key}" for name, model in sections().items() if name and key in model.model_fields]
    named = [place for place in named if place.rpartition(".")[0] not in LISTS]
    renamed = RENAMED.get(key, "").partition(": ")[0]
    return named or ([renamed] if "." in renamed else [])


REPEATS = {"data.mix": "data", "data.mix.rewards": "rewards"}
"""Sections that have keys of another one, in which they are explained."""


def repeats(section: str, key: str) -> bool:
    """Whether a section's key is one that another section explains."""
    other = REPEATS.get(section)
    return other is not None and key in sections()[other].model_fields


def foreign(name: str) -> str | None:
    """A hint for a name of another project, ``name`` dotted as it stands in the recipe; None if it is not known."""
    parts = name.split(".")
    leaf = parts[-1]
    for start in range(len(parts)):
        suffix = ".".join(parts[start:])
        if suffix in RENAMED:
            key, _, note = RENAMED[suffix].partition(": ")
            return f"`{leaf}` is `{key}` here" + (f" ({note})" if note else "")
        if suffix in NOT_HERE:
            return NOT_HERE[suffix]
    return next((hint for prefix, hint in PREFIXES.items() if leaf.startswith(prefix)), None)


def unknown_key(section: str, key: str) -> tuple[str, str | None]:
    """What to say of ``key``, unknown in ``section`` (dotted, without list indices), and the key it probably meant."""
    here = sections()[section].model_fields
    if hint := foreign(f"{section}.{key}" if section else key):
        return f"unknown key: {hint}", None
    homes = [name for name, model in sections().items() if key in model.model_fields and not repeats(name, key)]
    homes = [name for name in homes if not any(name.startswith(f"{outer}.") for outer in homes if outer)]
    if homes:
        places = " or ".join(name or "the top level" for name in homes)
        return f"unknown key, {key} belongs {'at' if homes[0] == '' else 'under'} {places}", None
    option = key.startswith("vllm_")  # so much is alike in these names that a near one has to be nearer
    if near := difflib.get_close_matches(key, here, n=1, cutoff=0.7 if option else 0.6):
        return f"unknown key, did you mean {near[0]}?", near[0]
    elsewhere = {leaf: name for name, model in reversed(sections().items()) for leaf in model.model_fields}
    if near := difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.8):
        return f"unknown key, did you mean {near[0]}, under {elsewhere[near[0]] or 'the top level'}?", None
    if option:
        return 'unknown key; further arguments of `vllm serve` go in rollout.vllm_args, as ["--max-num-seqs=256"]', None
    return f"unknown key; the keys here are {', '.join(here)}", None
