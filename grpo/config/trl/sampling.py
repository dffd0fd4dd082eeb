"""Rewards, rollouts and the loss: what of a configuration of TRL's says what is sampled and learned from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo.config.algorithm import LOSS_TYPES
from grpo.config.trl.environment import environment_pays
from grpo.config.trl.keys import CARRIED_VLLM
from grpo.config.trl.model import as_mapping
from grpo.errors import UserError

if TYPE_CHECKING:
    from grpo.config.trl.conversion import Conversion

# The functions that `trl grpo` knows by name.
TRL_REWARDS: dict[str, dict[str, Any]] = {
    "accuracy_reward": {"path": "trl.rewards:accuracy_reward"},
    "reasoning_accuracy_reward": {"path": "trl.rewards:reasoning_accuracy_reward"},
    "think_format_reward": {"path": "trl.rewards:think_format_reward", "shaping": True},
    "get_soft_overlong_punishment": {
        "name": "overlong",
        "args": {"max_completion_length": 1280, "soft_punish_cache": 256},
    },
}
NO_BOUND = 1e9  # stands for "no upper bound", which our key has no word for
IN_SAMPLING = {"top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "temperature": "temperature"}
LENGTHS = ("max_tokens", "max_new_tokens")
STOPS = ("stop", "stop_strings")


def convert_rewards(found: Conversion) -> None:
    """The list of reward functions with their weights, and which of them counts as accuracy."""
    names = found.get("reward_funcs") or []
    names = [str(name) for name in (names if isinstance(names, list) else [names])]
    weights = _weights(found) or [1.0] * len(names)
    if len(weights) != len(names):
        if names:
            text = f"{len(weights)} weights for {len(names)} functions, which TRL refuses too; 1.0 each"
            found.change("reward_weights", text)
        else:
            found.leave("reward_weights", f"belongs to the functions, which are not named: weight: {weights}, in order")
        weights = [1.0] * len(names)
    elif found.has("reward_weights"):
        found.carried.append(("reward_weights", "rewards: weight"))
    rewards = [reward for name, weight in zip(names, weights, strict=True) if (reward := _reward(found, name, weight))]
    if "path" in found.recipe.get("environment", {}) and (environment_pays(found) or not names):
        rewards.append({"name": "environment"})
        text = "rewards: name: environment, weight 1, which is what its get_reward returns"
        found.change("environment_factory", text if environment_pays(found) else f"{text}; it must have one")
    if not rewards:
        rewards = [{"path": "YOUR_REWARDS.py:YOUR_FUNCTION"}]
        what = "a function of yours (file.py:function), unchanged, or a built-in one (docs/rewards.md)"
        found.to_fill.append(("rewards", what))
    found.put("rewards", rewards, "reward_funcs")
    judges = [reward for reward in rewards if not reward.get("shaping") and reward.get("name") != "overlong"]
    if judges and judges[0] is not rewards[0]:
        name = str(judges[0]["path"]).rpartition(":")[2]
        found.put("evaluation.reward", name)
        found.defaults.append(("evaluation.reward", f"{name}, the first function that judges an answer"))


def _weights(found: Conversion) -> list[float]:
    given = found.get("reward_weights")
    listed = given if isinstance(given, list) else [] if given is None else [given]
    try:
        return [float(weight) for weight in listed]
    except (TypeError, ValueError):
        raise UserError(f"reward_weights: expected numbers, got {given!r}") from None


def _reward(found: Conversion, name: str, weight: float) -> dict[str, Any] | None:
    weighed = {} if weight == 1.0 else {"weight": weight}
    if name in TRL_REWARDS:
        reward = {**TRL_REWARDS[name], **weighed}
        if name == "get_soft_overlong_punishment":
            text = "overlong, with TRL's 1280 and 256; a completion that is cut off has the full punishment"
            found.change(f"reward_funcs: {name}", text)
        else:
            text = f"{reward['path']}, TRL's own function, so trl must be installed"
            ours = " Without it: {name: math}, which is exact and reads the column `answer`, not `solution`"
            if name == "accuracy_reward":
                ours += ". TRL's also pays an answer that stands in the thinking alone: grpo audit"
            found.change(f"reward_funcs: {name}", text + ("" if "format" in name else f".{ours}"))
        return reward
    if ":" in name or "." in name:
        module, _, function = name.replace(":", ".").rpartition(".")
        path = name if ":" in name else f"{module}:{function}"
        found.carried.append((f"reward_funcs: {name}", f"rewards: path: {path}"))
        return {"path": path, **weighed}
    found.left.append((f"reward_funcs: {name}", "TRL knows no function of this name; give its place, file.py:function"))
    return None


def convert_rollout(found: Conversion) -> None:
    """How completions are sampled, and by what."""
    longest = found.whole("max_completion_length")
    if found.has("max_completion_length"):
        found.carried.append(("max_completion_length", "rollout.max_completion_length"))
    extra = as_mapping(found, "generation_kwargs")
    for key in LENGTHS:
        if key in extra:
            longest = int(extra.pop(key))
            found.change(f"generation_kwargs.{key}", f"rollout.max_completion_length: {longest}")
    found.put("rollout.max_completion_length", longest, "max_completion_length")
    for key in STOPS:
        if key in extra:
            stop = extra.pop(key)
            found.put("rollout.stop", [stop] if isinstance(stop, str) else list(stop), "generation_kwargs")
            found.change(f"generation_kwargs.{key}", "rollout.stop; the text that ends a completion stays in it")
    for key in [key for key in extra if key in IN_SAMPLING]:
        found.given[key] = extra.pop(key)
        found.change(f"generation_kwargs.{key}", f"rollout.{key}, which it overrides in TRL too")
    for key in extra:
        text = "rollout has temperature, top_p, top_k, min_p and stop; what else changes the distribution has no place"
        found.left.append((f"generation_kwargs.{key}", text))
    if found.is_on("use_vllm"):
        _engine(found)
    else:
        found.put("rollout.backend", "hf")
        if found.has("use_vllm"):
            found.change("use_vllm", "rollout.backend: hf; auto takes vLLM where it can be had")
        for key in [key for key in found.given if key.startswith("vllm_") and key != "vllm_structured_outputs_regex"]:
            if key in CARRIED_VLLM or key in IMPORTANCE or key in SERVER:
                found.seen.add(key)
                if found.has(key) and found.given[key] != found.trl_default(key):
                    found.left.append((key, "only with use_vllm, which is not on"))
                else:
                    found.at_default.append(key)


IMPORTANCE = tuple(f"vllm_importance_sampling_{name}" for name in ("correction", "mode", "clip_max", "clip_min", "cap"))
SERVER = ("vllm_mode", "vllm_model_impl", "vllm_server_base_url", "vllm_server_host", "vllm_server_port")


def _engine(found: Conversion) -> None:
    mode = str(found.get("vllm_mode"))
    found.put("rollout.backend", "vllm")
    found.carried.append(("use_vllm", "rollout.backend"))
    found.put("rollout.vllm_mode", mode, "vllm_mode")
    if found.has("vllm_mode"):
        found.carried.append(("vllm_mode", "rollout.vllm_mode"))
    url, host, port = (found.get(f"vllm_server_{part}") for part in ("base_url", "host", "port"))
    if mode == "server":
        here = url or f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        found.put("rollout.vllm_server_base_url", here, "vllm_server_base_url")
        text = f"rollout.vllm_server_base_url: {here}; start the server with launch/vllm_serve.sh"
        found.change("vllm_server_base_url, vllm_server_host, vllm_server_port", text)
    else:
        for key in ("vllm_server_base_url", "vllm_server_host", "vllm_server_port"):
            found.leave(key, "only with vllm_mode: server")
    for key, (its_mode, carried) in CARRIED_VLLM.items():
        if its_mode == mode:
            found.carry(key, carried)
        else:
            place = "the server's own command line has it" if mode == "server" else "only with vllm_mode: server"
            found.leave(key, place)
    implementation = found.get("vllm_model_impl")
    if implementation != "vllm" and mode == "colocate":
        found.put("rollout.vllm_args", [f"--model-impl={implementation}"], "vllm_model_impl")
        found.change("vllm_model_impl", f'rollout.vllm_args: ["--model-impl={implementation}"]')
    elif implementation != "vllm":
        found.leave("vllm_model_impl", "the server's own command line has it (--model-impl)")


def convert_algorithm(found: Conversion) -> None:
    """Advantages, the loss, the reference model, the weights for what the sampler differs in."""
    loss = str(found.get("loss_type"))
    level = found.get("importance_sampling_level")
    if loss in LOSS_TYPES:
        found.put("algorithm.loss_type", loss, "loss_type")
        if found.has("loss_type"):
            found.carried.append(("loss_type", "algorithm.loss_type"))
    else:
        found.leave("loss_type", f"no loss here is called {loss}; ours are {', '.join(LOSS_TYPES)}. dapo stands")
    if level != "token" and loss != "luspo":
        found.put("algorithm.importance_sampling_level", level, "importance_sampling_level")
    if found.has("importance_sampling_level"):
        found.carried.append(("importance_sampling_level", "algorithm.importance_sampling_level"))
    if loss == "bnpo":
        size = found.whole("per_device_train_batch_size")
        found.put("training.micro_batch_size", size)
        found.change("loss_type: bnpo", f"is defined by micro-batches, so training.micro_batch_size: {size}")
    _clip(found, loss)
    _scale(found)
    _reference(found)
    if found.get("use_vllm"):
        _importance(found)


def _clip(found: Conversion, loss: str) -> None:
    high, epsilon = found.get("epsilon_high"), found.recipe["algorithm"].get("epsilon", 0.2)
    if loss == "cispo" and (high is None or high <= 1):
        text = f"algorithm.epsilon_high: null, which is 5; TRL bounds the weight itself at {high or epsilon} here"
        found.change("epsilon_high with loss_type cispo", text)
    elif high is not None:
        found.put("algorithm.epsilon_high", high, "epsilon_high")
        found.carried.append(("epsilon_high", "algorithm.epsilon_high"))
    delta = found.get("delta")
    if delta is not None and delta <= 1 + epsilon:
        found.leave("delta", f"must be above 1 + epsilon ({1 + epsilon}), or it cuts what epsilon allows")
    elif delta is not None:
        found.put("algorithm.delta", delta, "delta")
        found.carried.append(("delta", "algorithm.delta"))


def _scale(found: Conversion) -> None:
    scale = found.get("scale_rewards")
    scale = {True: "group", False: "none"}.get(scale, scale) if isinstance(scale, bool) else str(scale)
    how = str(found.get("multi_objective_aggregation"))
    if how != "sum_then_normalize":
        found.put("algorithm.multi_objective_aggregation", how, "multi_objective_aggregation")
    if found.has("multi_objective_aggregation"):
        found.carried.append(("multi_objective_aggregation", "algorithm.multi_objective_aggregation"))
    if how == "normalize_then_sum" and scale != "group":
        found.leave("scale_rewards", "normalize_then_sum normalizes by group, then by step, whatever it says")
        return
    found.put("algorithm.scale_rewards", scale, "scale_rewards")
    if found.has("scale_rewards"):
        found.carried.append(("scale_rewards", "algorithm.scale_rewards"))


def _reference(found: Conversion) -> None:
    beta = found.recipe["algorithm"].get("beta", 0.0)
    if beta:
        corrected = found.is_on("use_bias_correction_kl")
        if found.has("use_bias_correction_kl"):
            found.put("algorithm.use_bias_correction_kl", corrected, "use_bias_correction_kl")
            found.carried.append(("use_bias_correction_kl", "algorithm.use_bias_correction_kl"))
        else:
            found.default("algorithm.use_bias_correction_kl", True)
    else:
        found.leave("use_bias_correction_kl", "beta is 0, so there is no KL")
    keys = ("ref_model_mixup_alpha", "ref_model_sync_steps")
    if not found.is_on("sync_ref_model"):
        for key in keys:
            found.leave(key, "only with sync_ref_model, which is not on")
    elif not beta or "lora" in found.recipe["model"]:
        why = "beta is 0, so no reference model is held" if not beta else "with LoRA the reference is the frozen model"
        for key in ("sync_ref_model", *keys):
            found.leave(key, why)
    else:
        steps = found.steps(found.number("ref_model_sync_steps"))
        found.put("algorithm.sync_ref_model", True, "sync_ref_model")
        found.put("algorithm.ref_model_mixup_alpha", found.get("ref_model_mixup_alpha"), "ref_model_mixup_alpha")
        found.put("algorithm.ref_model_sync_steps", steps, "ref_model_sync_steps")
        found.carried += [(key, f"algorithm.{key}") for key in ("sync_ref_model", "ref_model_mixup_alpha")]
        found.change("ref_model_sync_steps", f"algorithm.ref_model_sync_steps: {steps}, in steps of ours")


def _importance(found: Conversion) -> None:
    if not found.is_on("vllm_importance_sampling_correction"):
        found.put("algorithm.importance_sampling_mode", "none", "vllm_importance_sampling_correction")
        found.change("vllm_importance_sampling_correction", "algorithm.importance_sampling_mode: none")
        for key in IMPORTANCE:
            found.leave(key, "the correction is off") if key not in found.seen else None
        return
    mode = found.get("vllm_importance_sampling_mode")
    if found.has("vllm_importance_sampling_mode"):
        found.put("algorithm.importance_sampling_mode", mode, "vllm_importance_sampling_mode")
        found.carried.append(("vllm_importance_sampling_mode", "algorithm.importance_sampling_mode"))
    else:
        found.default("algorithm.importance_sampling_mode", mode, "Ours takes token_truncate with vLLM")
    key = "vllm_importance_sampling_cap" if found.has("vllm_importance_sampling_cap") else IMPORTANCE[2]
    high = found.get(key)
    if IMPORTANCE[2] in found.given and found.given[key] is None:
        found.put("algorithm.importance_sampling_clip_max", NO_BOUND)
        found.change(key, f"null, no upper bound: algorithm.importance_sampling_clip_max: {NO_BOUND:g}")
    elif high <= 1:
        found.leave(key, "an upper bound of a ratio is above 1; algorithm.importance_sampling_clip_max stands at 3")
    elif found.has(key):
        found.put("algorithm.importance_sampling_clip_max", high, key)
        found.carried.append((key, "algorithm.importance_sampling_clip_max"))
    found.seen.update(IMPORTANCE)
    if (low := found.get("vllm_importance_sampling_clip_min")) is not None:
        found.put("algorithm.importance_sampling_clip_min", low, "vllm_importance_sampling_clip_min")
        found.carried.append(("vllm_importance_sampling_clip_min", "algorithm.importance_sampling_clip_min"))
