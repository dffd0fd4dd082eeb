"""The recipe's sections that fit on a screen each. The larger ones have files of their own: ``algorithm.py``,
``data.py``, ``prompts.py``, ``rewards.py`` and, for the vLLM part of `rollout`, ``vllm.py``.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticKnownError

from grpo.config.base import (
    BelowOne,
    Fraction,
    LocalPath,
    NonEmpty,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Problem,
    Section,
    refuse,
)
from grpo.config.vllm import VllmOptions

KERNELS = ("liger", "float32_head")


class LoraConfig(Section):
    r: PositiveInt = 16
    """Rank of the adapters."""
    lora_alpha: PositiveInt = 32
    """Scale: adapters are multiplied by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapters' input while training."""
    target_modules: str | list[str] = "all-linear"
    """Module names that get adapters; `all-linear` is every linear layer but the output head. A head and an embedding
    that share a weight (`tie_word_embeddings`) can have none."""


class ModelConfig(Section):
    name: LocalPath
    """Hub id, a folder that `from_pretrained` loads, another run's `final/`, or a GGUF file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; `auto`: bfloat16 where the device has instructions for it, or float32."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Type that trained weights and their gradients are held in. `bfloat16` halves both and needs the compute type
    bfloat16. The optimizer keeps the 16 bits that are missing to float32, so no update is rounded away. With
    `model.lora` the adapters are float32 and the rest is in the compute type."""
    load_in_4bit: bool = False
    """QLoRA (needs `model.lora` and bitsandbytes): the frozen weights of linear layers, but for the output head, in 4
    bits (NF4, scales quantized too)."""
    attn_implementation: str | None = None
    """Attention kernel by transformers' name (`sdpa`, `eager`, `flash_attention_2`); null lets transformers choose."""
    kernels: Literal["auto", "none"] | list[Literal["liger", "float32_head"]] = "auto"
    """Kernels that GPUs gain from. `auto`: on a GPU, all that can be had; on a CPU none. `liger`: norms and gated MLPs
    by Liger's (`pip install 'grpo-train[gpu]'`), compared at start with the model's own. `float32_head`: logits in
    float32 where the model computes in bfloat16, in the update, `rollout.backend: hf` and evaluation."""
    disable_dropout: bool = True
    """Turn off what the model's configuration makes random in training: dropout of every kind, layers left out, noise
    on a router. The policy that learns is then the one that samples. `lora.lora_dropout` stays. TRL's default is
    false."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, far less memory."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights. The reference model is then the model without them."""
    tokenizer: LocalPath | None = None
    """Tokenizer to load, where it is not the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""

    @field_validator("kernels", mode="before")
    @classmethod
    def _known_kernels(cls, given: Any) -> Any:
        named = given if isinstance(given, list) else [given]
        known = all(name in KERNELS for name in named)
        if given == "auto" or given == "none" or (known and isinstance(given, list)):
            return given
        text = f"must be auto, none or a list of {' and '.join(KERNELS)}, got {given!r}"
        raise ValueError(f"{text} (write [{given}])" if known else text)

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        problems = []
        if self.load_in_4bit and self.lora is None:
            text = "load_in_4bit holds weights that can't be trained, so it needs lora: {r: 16}, or another section"
            problems.append(Problem(("load_in_4bit", "lora"), text))
        if self.load_in_4bit and self.name.endswith(".gguf"):
            text = "load_in_4bit can't read a GGUF file: make it a folder first (python -m grpo.model.gguf FILE FOLDER)"
            problems.append(Problem(("load_in_4bit", "name"), text))
        if self.weights == "bfloat16" and self.lora is not None:
            text = "weights: bfloat16 is for training all weights; with lora the frozen ones are in the compute type"
            problems.append(Problem(("weights", "lora"), text))
        if self.weights == "bfloat16" and self.dtype == "float32":
            text = "weights: bfloat16 needs dtype: bfloat16 (or auto, on a device with instructions for it)"
            problems.append(Problem(("weights", "dtype"), text))
        refuse(problems)
        return self


class ScoringConfig(Section):
    workers: PositiveInt = 2
    """Processes that run reward functions, per training process."""
    timeout: Positive = 10.0
    """Seconds one call of a reward function may take before its worker is killed."""
    memory_limit_gb: Positive | None = 4.0
    """Address space of a worker; null sets no limit."""
    environment: list[NonEmpty] = Field(default_factory=list)
    """Environment variables that reward functions get although they look like secrets, such as `OPENAI_API_KEY`. All
    others of that kind (`HF_TOKEN`, `WANDB_API_KEY`, `AWS_…`) are not passed on; docs/rewards.md."""
    max_failure_rate: Fraction = 0.5
    """Share of a step's completions that may be unscorable; above it the run stops with the first traceback."""
    max_unscorable_rows: Fraction = 0.02
    """Share of the rows whose own answer or tests a built-in reward may be unable to read; above it no run begins.
    `grpo validate --rows` lists them with their reasons. Their completions have no reward."""


BACKENDS = ("auto", "hf", "vllm")


def _known_backend(name: Any) -> Any:
    """A backend of ours, or the place of one: file.py:name or package.module:name."""
    if name in BACKENDS or (isinstance(name, str) and all(part.strip() for part in name.rpartition(":"))):
        return os.path.expanduser(name)
    raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, BACKENDS))})


class RolloutConfig(VllmOptions):
    backend: Annotated[str, BeforeValidator(_known_backend), WithJsonSchema({"enum": [*BACKENDS, "file.py:name"]})] = (
        "hf"
    )
    """What generates: `hf` is transformers in the training process, `vllm` an engine beside it or servers elsewhere.
    `auto` is `vllm` where training runs on a GPU and vLLM can be had (installed here, in `vllm_python`, or as a
    server), else `hf`; the log says which, and why. Or a class of yours with `generate`, `sync` and `close`."""
    num_generations: Annotated[int, Field(ge=2, strict=True)] = 8
    """Completions per prompt, G. At least 2: an advantage compares a completion with its group."""
    max_completion_length: PositiveInt = 512
    """Longest completion in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature; the update computes its logprobs at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: smallest set of tokens with this probability; 1.0 is off."""
    top_k: NonNegativeInt = 0
    """Sample among the k likeliest tokens; 0 is off."""
    min_p: Fraction | None = None
    """Drop tokens less likely than this share of the likeliest; null is off."""
    stop: list[NonEmpty] = Field(default_factory=list)
    """Strings that end a completion (they stay in it), besides the model's end-of-sequence tokens."""
    max_batch_size: PositiveInt = 512
    """Most sequences decoded at once, per process (`backend: hf`)."""
    kv_cache_gb: Positive | None = None
    """Keys and values held at once, in GB per process (`backend: hf`); null is a quarter of the device's memory. Where
    they do not fit, fewer completions run at once, and some are computed again."""
    max_staleness: NonNegativeInt = 0
    """With `backend: vllm` (or one of yours that can): sample up to this many steps ahead while training goes on. No
    token that a step learns from is of a policy more than so many steps old. What is in flight goes on under new
    weights; `algorithm.importance_sampling_mode` corrects for the difference. 0 samples on-policy."""

    @model_validator(mode="before")
    @classmethod
    def _was_overlap(cls, given: Any) -> Any:
        """Recipes, run folders and checkpoints of before `max_staleness` have `overlap`, which was one step ahead."""
        if isinstance(given, dict) and isinstance(given.get("overlap"), bool):
            rest = {name: value for name, value in given.items() if name != "overlap"}
            return {"max_staleness": int(given["overlap"])} | rest
        return given

    @model_validator(mode="after")
    def _backend_settings(self) -> RolloutConfig:
        problems = self.vllm_problems(self.backend)
        if self.max_staleness and self.backend == "hf":
            text = "max_staleness above 0 needs backend: vllm (backend is hf, which samples with the trainer)"
            problems.append(Problem(("max_staleness", "backend"), text))
        refuse(problems)
        return self


class OptimizerConfig(Section):
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"
    """AdamW with its moments in float32 (8 bytes a weight), in 8 bits (2 bytes; bitsandbytes), or in 8 bits and paged
    out to the host's memory where the GPU's runs short (bitsandbytes; not with FSDP2 or `model.weights: bfloat16`)."""
    offload: bool = False
    """Hold AdamW's state in the host's memory; each step moves it to the device and back, a piece at a time. The
    numbers are those of a state that stays on the device."""
    learning_rate: Positive = 1e-6
    """Peak learning rate of AdamW."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_beta1: BelowOne = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: BelowOne = 0.999
    """AdamW's second-moment decay."""
    adam_epsilon: Positive = 1e-8
    """AdamW's denominator offset."""
    max_grad_norm: NonNegative = 1.0
    """Clip the global gradient norm to this; 0 is off."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling to lr_min_ratio of the peak at max_steps."""
    lr_min_ratio: Fraction = 0.0
    """Where linear and cosine end, as a share of the peak."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""


class TrainingConfig(Section):
    output_dir: LocalPath
    """Run folder: metrics, rollouts, checkpoints, the final model, the report."""
    prompts_per_step: PositiveInt = 32
    """Prompts drawn per step over all processes, P (with `stage: sft`: examples per step)."""
    max_steps: PositiveInt = 100
    """Steps: one rollout and its updates each (with `stage: sft`: optimizer steps)."""
    max_seconds: Positive | None = None
    """End the run after the step that passes this many seconds of training (evaluation not counted)."""
    seed: NonNegativeInt = 0
    """Root of every random draw."""
    eval_every: NonNegativeInt = 50
    """Evaluate every so many steps, besides before step 0 and at the end; 0: only there."""
    save_every: NonNegativeInt = 50
    """Checkpoint every so many steps, besides at the end; 0: only there."""
    save_best: Annotated[str, Field(pattern="^eval/.+")] | None = None
    """A metric of evaluation, such as `eval/accuracy`: where it is better than ever before, the model is written to
    OUTPUT_DIR/best, as final/ is at the end, with its model card. The largest is the best, or the smallest where the
    name ends in `loss`."""
    patience: PositiveInt | None = None
    """End the run, as after its last step, when so many evaluations in a row were no better (needs `save_best`)."""
    save_total_limit: Annotated[int, Field(ge=2, strict=True)] = 2
    """Checkpoints kept, newest first; at least 2, so that a damaged one has a predecessor."""
    micro_batch_tokens: PositiveInt | None = None
    """Most tokens in one forward and backward pass, per process, a prompt counted once for its completions in it; null
    is as many as memory holds and are of use."""
    micro_batch_size: PositiveInt | None = None
    """Most sequences in one forward and backward pass; null is bounded by micro_batch_tokens alone."""
    log_rollouts_every: NonNegativeInt = 1
    """Write rollouts/step_N.jsonl every so many steps; 0 never."""
    ddp_timeout: Positive | None = None
    """Seconds that a process waits for the others before it gives up on one that hangs; null is 1800, or more where
    vLLM's timeouts add up to more."""
    peer_timeout: Annotated[float, Field(ge=5)] = 60.0
    """Seconds without an answer from a process's machine, or, after the first step, without a word from a process that
    is stopped, after which it counts as lost, and the others end. A stopped process of another node has five times as
    long, and before the first step `ddp_timeout`."""
    replica_check_every: NonNegativeInt = 10
    """With several processes: compare the weights of those that hold the same ones (DDP; HSDP's nodes) every so many
    steps, besides at the start and before each checkpoint. All stop where one differs, and name it; 0: never."""
    num_threads: PositiveInt | None = None
    """CPU threads of torch; null keeps torch's choice. Bit-exact resume needs the same number."""
    dollars_per_hour: NonNegative | None = None
    """Price of the machine; adds `cost_usd` (of steps) and `cost_usd_wall_clock` (since the command began) to the
    metrics, and shows what the run has cost and will."""

    @model_validator(mode="after")
    def _patience_with_what(self) -> TrainingConfig:
        if self.patience is not None and self.save_best is None:
            refuse(
                [
                    Problem(
                        ("patience", "save_best"), "patience counts evaluations that were no better, so set save_best"
                    )
                ]
            )
        return self


class TrackingConfig(Section):
    project: str = "grpo"
    """Project name for the trackers."""
    run_name: str | None = None
    """Run name for the trackers; null takes the output folder's name."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; offline writes files that `wandb sync` uploads later."""
    tensorboard: bool = False
    """Write TensorBoard events to OUTPUT_DIR/tensorboard."""
    trackio: bool = False
    """Log to trackio (local first)."""
