"""Batch, length, schedule and rhythm: TRL counts processes, accumulation and optimizer steps, a recipe prompts and
rollouts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from grpo.config.trl.model import as_mapping

if TYPE_CHECKING:
    from grpo.config.trl.conversion import Conversion

OPTIMIZERS = {
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
}
NEAREST = {"cosine_with_restarts": "cosine", "polynomial": "linear", "warmup_stable_decay": "linear"}
TRACKERS = {"wandb": ("wandb", "online"), "tensorboard": ("tensorboard", True), "trackio": ("trackio", True)}


def convert_batch(found: Conversion) -> None:
    """How many prompts a step has, and into how many updates it is split."""
    device, accumulation = found.whole("per_device_train_batch_size"), found.whole("gradient_accumulation_steps")
    processes = found.num_processes or _processes_of_saved(found, device) or 1
    where = f"{processes} process{'es' * (processes > 1)}"
    if found.num_processes is None and processes == 1:
        found.defaults.append(
            ("training.prompts_per_step", "for one process; --num-processes N says how many TRL's run had")
        )
    if found.stage == "sft":
        batch = device * accumulation * processes
        found.put("training.prompts_per_step", batch)
        keys = f"per_device_train_batch_size {device} x gradient_accumulation_steps {accumulation} x {where}"
        found.change(keys, f"training.prompts_per_step: {batch} rows a step; what a pass holds follows from memory")
        return
    G = found.whole("num_generations")
    if found.has("generation_batch_size"):
        per_generation = max(1, found.whole("generation_batch_size") // (device * processes))
    elif found.has("steps_per_generation"):
        per_generation = found.whole("steps_per_generation")
    else:
        per_generation = accumulation
    found.seen.update(("generation_batch_size", "steps_per_generation"))
    if found.has("generation_batch_size"):
        found.change("generation_batch_size", f"is steps_per_generation {per_generation}")
    passes = max(per_generation, accumulation)  # an optimizer step may take several rollouts of the same policy
    completions = device * processes * passes
    prompts = max(1, round(completions / G))
    updates = max(1, per_generation // accumulation)
    while prompts % updates:
        updates -= 1
    keys = (
        f"per_device_train_batch_size {device} x {where} x {passes} passes (gradient_accumulation_steps {accumulation}"
    )
    keys += f", steps_per_generation {per_generation}) / num_generations {G}"
    text = f"training.prompts_per_step: {prompts}, that is {prompts * G} completions"
    if updates > 1:
        text += f"; algorithm.num_minibatches: {updates}, an optimizer step each"
        found.put("algorithm.num_minibatches", updates)
    if prompts * G != completions:
        text += f". {completions} completions are no whole groups of {G}, which TRL refuses"
    if updates != max(1, per_generation // accumulation) or max(passes, 1) % min(per_generation, accumulation):
        text += f". TRL makes {per_generation / accumulation:g} updates of a rollout, which does not divide into it"
    found.put("training.prompts_per_step", prompts)
    found.change(keys, f"{text}. What a pass holds follows from memory (training.micro_batch_tokens)")


def _processes_of_saved(found: Conversion, device: int) -> int:
    """The processes of a configuration that was saved by a run, which has both numbers (in a file TRL refuses that);
    0 where it does not say."""
    if not found.has("generation_batch_size") or not found.has("steps_per_generation"):
        return 0
    processes, rest = divmod(found.whole("generation_batch_size"), device * found.whole("steps_per_generation"))
    return 0 if rest else processes


def convert_length(found: Conversion) -> None:
    """The number of steps, the optimizer, and the learning rate over them."""
    prompts = found.recipe["training"]["prompts_per_step"]
    given = found.number("max_steps")
    epochs = found.number("num_train_epochs")
    # TRL's sampler for rollouts leaves out what is no whole batch; that of supervised training keeps it.
    epoch = math.ceil((found.rows or 0) / prompts) if found.stage == "sft" else max(1, (found.rows or 0) // prompts)
    if given > 0:
        steps = found.steps(given)
        found.change("max_steps", f"training.max_steps: {steps} (TRL counts optimizer steps, a recipe rollouts)")
        found.leave("num_train_epochs", "max_steps is given, which TRL takes instead")
    elif found.rows:
        steps = max(1, math.ceil(epochs * epoch))
        text = f"training.max_steps: {steps}, that is {epochs:g} times {found.rows} rows, {prompts} a step"
        found.change(f"num_train_epochs {epochs:g}", text)
    else:
        steps = 100
        text = f"steps; TRL's {epochs:g} epochs are rows x {epochs:g} / {prompts} steps: --rows N computes that"
        found.to_fill.append(("training.max_steps", text))
    found.put("training.max_steps", steps, "max_steps")
    name = str(found.get("optim"))
    if name not in OPTIMIZERS:
        found.leave("optim", f"the optimizer is AdamW: {', '.join(sorted(set(OPTIMIZERS.values())))}")
    else:
        found.put("optimizer.optim", OPTIMIZERS[name], "optim")
        if found.has("optim"):
            found.carried.append(("optim", "optimizer.optim"))
    _schedule(found, steps)


def _schedule(found: Conversion, steps: int) -> None:
    name = str(found.get("lr_scheduler_type"))
    ours = SCHEDULES.get(name) or NEAREST.get(name, "constant")
    if not found.has("lr_scheduler_type"):
        found.default("optimizer.lr_scheduler_type", "linear")
    elif name == ours:
        found.put("optimizer.lr_scheduler_type", ours, "lr_scheduler_type")
        found.carried.append(("lr_scheduler_type", "optimizer.lr_scheduler_type"))
    else:
        found.put("optimizer.lr_scheduler_type", ours, "lr_scheduler_type")
        near = "" if name in SCHEDULES else f", the nearest to {name}, which has no place here"
        found.change("lr_scheduler_type", f"optimizer.lr_scheduler_type: {ours}{near}")
    rate = found.recipe["optimizer"].get("learning_rate", 1e-6)
    for key, value in as_mapping(found, "lr_scheduler_kwargs").items():
        if key in ("min_lr", "min_lr_rate") and ours == "cosine" and value is not None:
            ratio = value if key == "min_lr_rate" else value / rate
            found.put("optimizer.lr_min_ratio", ratio, "lr_scheduler_kwargs")
            found.change(f"lr_scheduler_kwargs.{key}", f"optimizer.lr_min_ratio: {ratio:g}")
        else:
            found.left.append((f"lr_scheduler_kwargs.{key}", "a schedule has optimizer.lr_min_ratio alone"))
    key = "warmup_ratio" if found.has("warmup_ratio") and not found.get("warmup_steps") else "warmup_steps"
    other = {"warmup_ratio": "warmup_steps", "warmup_steps": "warmup_ratio"}[key]
    warmup = found.number(key)
    is_share = key == "warmup_ratio" or warmup < 1
    warmup_steps = math.ceil(warmup * steps) if is_share else found.steps(warmup)
    if name == "constant" and warmup:
        found.leave(key, "transformers' `constant` has no warm-up; constant_with_warmup has: optimizer.warmup_steps")
    elif warmup:
        found.put("optimizer.warmup_steps", warmup_steps, key)
        found.change(key, f"optimizer.warmup_steps: {warmup_steps} of {steps} steps of ours")
    elif found.has(key):
        found.carried.append((key, "optimizer.warmup_steps"))
    found.seen.add(other)
    if found.has(other) and found.given[other]:
        found.leave(other, f"{key} is taken instead")


def convert_rhythm(found: Conversion) -> None:
    """How often a run evaluates and saves, and what it tells."""
    _evaluation(found)
    strategy, given = str(found.get("save_strategy")), found.number("save_steps")
    if strategy == "no":
        every = 0
        found.change("save_strategy", "training.save_every: 0, at the end alone")
    elif strategy == "epoch":
        every = _epoch(found)
        found.change("save_strategy", f"training.save_every: {every} steps{_of_an_epoch(found)}")
    else:
        every = _every(found, given)
        if found.has("save_steps"):
            found.change("save_steps", f"training.save_every: {every} steps of ours")
        else:
            found.defaults.append(("training.save_every", f"{every}, from TRL's save_steps 500; ours is 50"))
        if strategy != "steps":
            found.leave("save_strategy", "checkpoints are written by steps")
    found.put("training.save_every", every)
    limit = found.get("save_total_limit")
    if limit is None:
        found.defaults.append(("training.save_total_limit", "2; TRL keeps all checkpoints"))
    else:
        limit = found.whole("save_total_limit")
        found.put("training.save_total_limit", max(2, limit), "save_total_limit")
        if limit < 2:
            text = "training.save_total_limit: 2 at the least, so that a damaged checkpoint has a predecessor"
            found.change("save_total_limit", text)
        else:
            found.carried.append(("save_total_limit", "training.save_total_limit"))
    if found.has("ddp_timeout") and found.number("ddp_timeout") != 1800:
        found.put("training.ddp_timeout", found.number("ddp_timeout"), "ddp_timeout")
        found.carried.append(("ddp_timeout", "training.ddp_timeout"))
    found.seen.add("ddp_timeout")
    _trackers(found)


def _evaluation(found: Conversion) -> None:
    strategy = str(found.get("eval_strategy")).lower()
    if strategy in ("no", "false"):
        found.put("data.eval_size", 0)
        text = "0: TRL does not evaluate unless eval_strategy says so. Rows held out (ours: 256) would give accuracy"
        found.defaults.append(("data.eval_size", text))
        for key in ("eval_steps", "eval_on_start", "num_generations_eval"):
            found.leave(key, "eval_strategy is no")
        found.seen.add("eval_strategy")
        return
    if strategy == "epoch":
        every = _epoch(found)
        found.change("eval_strategy", f"training.eval_every: {every} steps{_of_an_epoch(found)}")
    else:
        logging = found.given.get("logging_steps")
        given = found.number("eval_steps") if found.has("eval_steps") else 10 if logging is None else float(logging)
        every = _every(found, given)
        found.change("eval_strategy, eval_steps", f"training.eval_every: {every} steps of ours")
    found.seen.add("eval_steps")
    found.put("training.eval_every", every)
    found.defaults.append(("data.eval_size", "256, at most so many held-out rows; TRL takes all of its test split"))
    if found.has("eval_on_start"):
        found.put("evaluation.at_start", found.is_on("eval_on_start"), "eval_on_start")
        found.carried.append(("eval_on_start", "evaluation.at_start"))
    else:
        found.default("evaluation.at_start", False)
    if found.stage == "sft":
        return
    samples = found.get("num_generations_eval") or found.whole("num_generations")
    found.put("evaluation.num_generations", samples, "num_generations_eval")
    if found.has("num_generations_eval"):
        found.carried.append(("num_generations_eval", "evaluation.num_generations"))
    else:
        found.defaults.append(("evaluation.num_generations", f"{samples}, as many as in training; ours is 1"))
    temperature = found.recipe["rollout"].get("temperature", 1.0)
    if temperature != 1.0:
        found.put("evaluation.temperature", temperature)
        found.defaults.append(("evaluation.temperature", f"{temperature}, that of training, as in TRL; ours is 1.0"))


def _every(found: Conversion, given: float) -> int:
    """Steps of ours for a number of optimizer steps, or for a share of the run (below 1)."""
    return max(1, math.ceil(given * found.recipe["training"]["max_steps"]) if given < 1 else found.steps(given))


def _epoch(found: Conversion) -> int:
    return max(1, found.rows // found.recipe["training"]["prompts_per_step"]) if found.rows else 50


def _of_an_epoch(found: Conversion) -> str:
    return ", an epoch" if found.rows else "; an epoch is rows / training.prompts_per_step: --rows N computes that"


def _trackers(found: Conversion) -> None:
    given = found.get("report_to")
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    for name in names:
        if name in TRACKERS:
            key, value = TRACKERS[name]
            found.put(f"tracking.{key}", value, "report_to")
            found.change(f"report_to: {name}", f"tracking.{key}: {str(value).lower()}")
        elif name == "all":
            found.leave("report_to", "all: name them: tracking.wandb, tracking.tensorboard, tracking.trackio")
        elif name not in ("none", "None"):
            found.left.append((f"report_to: {name}", "trackers are wandb, tensorboard and trackio"))
    if found.has("report_to") and names in (["none"], []):
        found.carried.append(("report_to", "tracking, all off"))
    project = found.get("project")
    if found.has("project") and project != "huggingface":
        found.put("tracking.project", str(project), "project")
        found.carried.append(("project", "tracking.project"))
