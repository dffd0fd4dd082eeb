"""The model and the rows: what of a configuration of TRL's says what is trained, and on what."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.config.trl.conversion import Conversion

FILES = (".jsonl", ".parquet", ".csv")


def convert_model(found: Conversion) -> None:
    """Name, types, kernels, adapters."""
    if not found.has("model_name_or_path"):
        found.fill("model.name", "YOUR_MODEL", "hub id or folder of the model; TRL's trainer takes it as `model`")
    init = as_mapping(found, "model_init_kwargs")
    for key, value in init.items():
        taken = {"torch_dtype": "dtype", "revision": "model_revision"}.get(key, key)
        if taken in ("dtype", "attn_implementation", "model_revision", "trust_remote_code"):
            found.given[taken] = value
        else:
            found.left.append((f"model_init_kwargs.{key}", "weights are loaded by a way of our own; section model"))
    if found.get("model_revision") != "main":
        found.put("model.revision", found.get("model_revision"), "model_revision")
        found.carried.append(("model_revision", "model.revision"))
    if attention := found.get("attn_implementation"):
        found.put("model.attn_implementation", attention, "attn_implementation")
        found.carried.append(("attn_implementation", "model.attn_implementation"))
    if found.get("router_aux_loss_coef") is not None:
        found.put("algorithm.router_aux_loss_coef", found.number("router_aux_loss_coef"), "router_aux_loss_coef")
        found.carried.append(("router_aux_loss_coef", "algorithm.router_aux_loss_coef"))
    uses_lora = found.is_on("use_peft")
    _convert_types(found, uses_lora)
    _convert_lora(found, uses_lora)


def _convert_types(found: Conversion, uses_lora: bool) -> None:
    weights = str(found.get("torch_dtype") or found.get("dtype"))
    if found.is_on("fp16") or weights == "float16":
        found.change("fp16, dtype", "float16 is not supported: model.dtype: bfloat16")
        compute = "bfloat16"
    elif found.has("bf16"):
        compute = "bfloat16" if found.is_on("bf16") else "float32"
        found.change("bf16", f"model.dtype: {compute}")
    else:
        compute = "auto"
        if weights != "bfloat16":
            text = "auto; TRL computes in bfloat16, and so does auto where the device can"
            found.defaults.append(("model.dtype", text))
    if weights == "bfloat16":
        compute = "bfloat16"
        text = "the optimizer keeps the 16 bits that bfloat16 lacks to float32, so no update is rounded away"
        if uses_lora:
            found.change("dtype", "adapters are float32 and frozen weights in model.dtype")
        else:
            found.put("model.weights", "bfloat16", "dtype")
            found.change("dtype", f"model.weights: bfloat16; {text}")
    elif weights == "auto":
        found.change("dtype", "model.weights: float32; TRL's auto takes the type of the file")
    elif found.has("dtype") or found.has("torch_dtype"):
        found.change("dtype", "model.weights: float32 is the type of trained weights")
    found.put("model.dtype", compute, "bf16")


def _convert_lora(found: Conversion, uses_lora: bool) -> None:
    keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "load_in_4bit")
    quantization = ("bnb_4bit_quant_type", "use_bnb_nested_quant")
    if not uses_lora:
        for key in (*keys, *quantization):
            found.leave(key, "only with use_peft, which is not on")
        return
    found.seen.add("use_peft")
    r, alpha = found.whole("lora_r"), found.whole("lora_alpha")
    if found.is_on("use_rslora"):
        scaled = round(alpha * math.sqrt(r))
        found.change(
            "use_rslora", f"lora_alpha {alpha} times the root of lora_r {r} is model.lora.lora_alpha: {scaled}"
        )
        alpha = scaled
    found.put("model.lora.r", r, "lora_r")
    found.put("model.lora.lora_alpha", alpha, "lora_alpha")
    found.carried.append(("use_peft", "model.lora"))
    found.carried += [(key, f"model.lora.{'r' if key == 'lora_r' else key}") for key in keys[:2] if found.has(key)]
    if found.has("lora_dropout"):
        found.put("model.lora.lora_dropout", found.get("lora_dropout"), "lora_dropout")
        found.carried.append(("lora_dropout", "model.lora.lora_dropout"))
    else:
        found.default("model.lora.lora_dropout", 0.05)
    modules = found.get("lora_target_modules")
    if modules:
        modules = modules if isinstance(modules, list) else [modules]
        is_all = modules == ["all-linear"]
        found.put("model.lora.target_modules", "all-linear" if is_all else modules, "lora_target_modules")
        found.carried.append(("lora_target_modules", "model.lora.target_modules"))
    else:
        why = "This is what PEFT takes for Llama, Mistral, Qwen and Gemma; other architectures have other names"
        found.default("model.lora.target_modules", ["q_proj", "v_proj"], why)
    if found.is_on("load_in_4bit"):
        found.put("model.load_in_4bit", True, "load_in_4bit")
        found.carried.append(("load_in_4bit", "model.load_in_4bit"))
        if found.get("bnb_4bit_quant_type") != "nf4":
            found.change("bnb_4bit_quant_type", "4-bit weights are NF4")
        if not found.is_on("use_bnb_nested_quant"):
            found.defaults.append(("model.load_in_4bit", "scales are quantized too; TRL's use_bnb_nested_quant is off"))
    else:
        for key in quantization:
            found.leave(key, "only with load_in_4bit")


def convert_data(found: Conversion) -> None:
    """Where rows come from, how they become prompts, how long they may be."""
    name, arguments = _source(found)
    if name is None:
        what = "hub id of the rows, or data.path for a file; TRL's trainer takes them as `train_dataset`"
        found.fill("data.hub", "YOUR_DATASET", what)
    elif name.endswith(FILES):
        found.put("data.path", name, "dataset_name")
        found.change("dataset_name", f"data.path: {name}")
    else:
        found.put("data.hub", name, "dataset_name")
        found.carried.append(("dataset_name", "data.hub"))
    if arguments:
        found.put("data.args", arguments)
    if column := found.get("dataset_prompt_column"):
        found.put("data.prompt_column", column, "dataset_prompt_column")
        found.carried.append(("dataset_prompt_column", "data.prompt_column"))
    if found.stage == "sft":
        _sft_lengths(found)
    else:
        _template(found)
        _prompt_length(found)


def _source(found: Conversion) -> tuple[str | None, dict[str, Any]]:
    """A hub id or file, and the arguments of ``load_dataset``."""
    mixture = found.get("datasets")
    evaluates = found.get("eval_strategy") not in ("no", False)
    splits = {"split": found.get("dataset_train_split"), "eval_split": found.get("dataset_test_split")}
    if not evaluates:
        del splits["eval_split"]
        found.leave("dataset_test_split", "eval_strategy is no, so nothing is held out")
    if isinstance(mixture, list) and mixture and isinstance(mixture[0], dict):
        if len(mixture) > 1:
            rest = ", ".join(str(part.get("path")) for part in mixture[1:] if isinstance(part, dict))
            text = f"a recipe has one source: the first is taken; put {rest} into one file with it (data.path)"
            found.left.append(("datasets", text))
        first = {key: value for key, value in mixture[0].items() if value is not None}
        for key in ("columns", "fraction"):
            if key in first:
                found.left.append((f"datasets.0.{key}", "rows are read whole; prompt_column says which is the prompt"))
        found.leave("dataset_name", "TRL takes datasets instead where both are given")
        arguments = {key: value for key, value in first.items() if key in ("name", "data_dir", "data_files", "split")}
        return str(first.get("path")), arguments
    name = found.get("dataset_name")
    config = found.get("dataset_config")
    arguments = {"name": config} if config else {}
    if config:
        found.carried.append(("dataset_config", "data.args.name"))
    if name is None or str(name).endswith(FILES):
        if evaluates and name is not None:
            found.change(
                "dataset_test_split", "data.eval_size rows of the file are held out; or name a file: data.eval_path"
            )
        if name is not None and splits["split"] != "train":
            found.leave("dataset_train_split", "a file is taken whole; data.train_size takes its first rows")
        return name, {}
    for key, value in splits.items():
        if key == "eval_split" or value != "train":
            arguments[key] = value
            given = "dataset_train_split" if key == "split" else "dataset_test_split"
            if found.has(given):
                found.carried.append((given, f"data.args.{key}"))
            else:
                found.defaults.append((f"data.args.{key}", f"{value}, the split that TRL evaluates on"))
    return str(name), arguments


def _template(found: Conversion) -> None:
    chat = as_mapping(found, "chat_template_kwargs")
    system = found.get("system_prompt")
    functions = found.given.get("reward_funcs") or []
    of_messages = [name for name in functions if str(name) in ("accuracy_reward", "think_format_reward")]
    if chat or system or of_messages:
        found.put("data.template", "chat")
        why = of_messages[0] if of_messages else "chat_template_kwargs" if chat else "system_prompt"
        found.change(f"prompts as messages ({why} needs them)", "data.template: chat")
        if chat:
            found.put("data.chat_template_kwargs", chat, "chat_template_kwargs")
            found.carried.append(("chat_template_kwargs", "data.chat_template_kwargs"))
        if system:
            found.put("data.system_prompt", system, "system_prompt")
            found.carried.append(("system_prompt", "data.system_prompt"))
    else:
        text = "none, which takes text as it stands; where prompts are messages, TRL applies the chat template: chat"
        found.put("data.template", "none")
        found.defaults.append(("data.template", text))


def _prompt_length(found: Conversion) -> None:
    if found.has("max_prompt_length"):
        longest = found.whole("max_prompt_length")
        found.put("data.max_prompt_length", longest, "max_prompt_length")
        found.put("data.too_long", "drop")
        found.change("max_prompt_length", "data.max_prompt_length; TRL cut longer prompts, here they are dropped")
        return
    room = found.given.get("vllm_max_model_length")
    if isinstance(room, int) and room > found.whole("max_completion_length"):
        longest = room - found.whole("max_completion_length")
        found.put("data.max_prompt_length", longest)
        found.defaults.append(
            ("data.max_prompt_length", f"{longest}, what vllm_max_model_length leaves; TRL has no limit")
        )
    else:
        text = "512; TRL has no limit. Prompts that are longer are named before the run begins"
        found.put("data.max_prompt_length", 512)
        found.defaults.append(("data.max_prompt_length", text))


def _sft_lengths(found: Conversion) -> None:
    longest = found.whole("max_length")
    text = (
        f"{longest} for data.max_prompt_length and rollout.max_completion_length each; longer rows are dropped, not cut"
    )
    found.put("data.max_prompt_length", longest, "max_length")
    found.put("rollout.max_completion_length", longest, "max_length")
    found.put("data.too_long", "drop")
    if found.has("max_length"):
        found.change("max_length", text)
    else:
        found.defaults.append(("data.max_prompt_length", f"TRL's max_length is 1024 for both together: {text}"))


def as_mapping(found: Conversion, key: str) -> dict[str, Any]:
    """A key that holds a mapping, or one as JSON text, as TRL's command line takes it."""
    value = found.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
            found.leave(key, "is neither a mapping nor one in JSON")
    return dict(value) if isinstance(value, dict) else {}
