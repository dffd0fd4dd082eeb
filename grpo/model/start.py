"""How the trained model comes to be: read once, checked, and brought to every process in little memory.

One process on a CPU trains on the model as it is read. Otherwise only the first process reads the weights, in the type
that they are stored in. Every process makes a shell (a model without weights), shards it under FSDP2, and gives it
memory. The first process then sends what it read, tensor by tensor.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator

from grpo import kernels
from grpo.config import Recipe
from grpo.errors import RunError, UserError
from grpo.model.borders import check_rope, past_borders
from grpo.model.dropout import check_repeats, turn_off_dropout
from grpo.model.export import rehearse
from grpo.model.first_process import on_main
from grpo.model.loading import attention_keyword, load_configs, load_quantized, load_weights
from grpo.model.logprob_lm import LogprobLM
from grpo.model.lora import add_adapters, as_if_trained, base_of
from grpo.model.packed_check import all_cores, in_float32, why_padded
from grpo.model.placing import fill, is_sharded, match, materialize, shard, shell
from grpo.model.routing import route_in_compute_type
from grpo.model.unused import described, freeze_unused
from grpo.randomness import Stream, key

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("grpo")


class Started(NamedTuple):
    """The model that trains, on this process's device."""

    logprob_lm: LogprobLM
    peft_model: Any  # with LoRA: peft's model around the same transformers model
    packed: bool  # whether it computes packed rows


class Equipped(NamedTuple):
    causal_lm: PreTrainedModel
    peft_model: Any
    cannot_pack: str | None
    unused: list[str]  # weights without a gradient, which are frozen


def start(
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    weights: torch.dtype,
    compute_dtype: torch.dtype,
) -> Started:
    """The model of ``recipe``, its trained weights in ``weights``. Called by all processes.

    Raises:
        UserError: the model can't be loaded, is not one that can be trained, or what is trained of it could not be
            written in the end.
        RunError: processes differ in what they can compute.
    """
    device, sharded = accelerator.device, is_sharded(accelerator)
    if recipe.model.load_in_4bit and sharded:
        raise UserError(
            "model.load_in_4bit: 4-bit weights are not sharded, each process holds them all: start with "
            "accelerate launch --config_file launch/ddp.yaml"
        )
    as_read = accelerator.num_processes == 1 and device.type == "cpu" and not sharded
    read: list[Equipped] = []

    def read_and_check() -> tuple[str | None, list[str]]:
        # Every other type is rounded to while loading: some models keep a few layers in float32 then.
        dtype = weights if as_read or weights != torch.float32 else None
        read.append(_equip(load_weights(recipe.model, dtype), recipe, device, sharded, unused=None))
        _rehearse(read[0], tokenizer, recipe)
        logprob_lm = LogprobLM(read[0].causal_lm)
        longest = recipe.longest_sequence()
        check_rope(logprob_lm.causal_lm, longest)
        with in_float32(logprob_lm), all_cores(device):
            with as_if_trained(logprob_lm):
                logprob_lm.check(past_borders(logprob_lm.config, longest), longest)
            if recipe.model.disable_dropout:
                check_repeats(logprob_lm)  # adapters as they are: these have a dropout of the recipe's
        with as_if_trained(logprob_lm):
            why = read[0].cannot_pack or why_padded(logprob_lm, device, compute_dtype, longest)
        return why, read[0].unused

    why, unused = on_main(accelerator, read_and_check)
    if accelerator.is_main_process:
        if unused:
            log.info("update: %d weights that no text reaches stay as they are: %s", len(unused), described(unused))
        log.info(
            "update: %s",
            "packed rows, each prompt computed once for its completions"
            if why is None
            else f"padded rows, which are slower, for {type(read[0].causal_lm).__name__}: {why}",
        )
    if recipe.model.load_in_4bit:  # how a model packs was found without quantizing it
        read.clear()
        mine = _quantized(recipe, device, compute_dtype, unused)
        return Started(LogprobLM(mine.causal_lm).train(), mine.peft_model, why is None)
    if as_read:
        return Started(LogprobLM(read[0].causal_lm).train(), read[0].peft_model, why is None)
    mine = _equip(_shell(recipe, weights), recipe, device, sharded, unused)
    if why is None and mine.cannot_pack:
        rank = accelerator.process_index
        raise RunError(f"the first process packs rows, but rank {rank} can't: {mine.cannot_pack}")
    logprob_lm = LogprobLM(mine.causal_lm).train()
    source = LogprobLM(read.pop().causal_lm) if read else None
    match(logprob_lm, source, weights)
    if sharded:
        shard(logprob_lm, accelerator)
    materialize(logprob_lm, device)
    fill(logprob_lm, source, several=accelerator.num_processes > 1)
    del source
    gc.collect()  # patched modules refer to themselves, so what was read would stay
    return Started(logprob_lm, mine.peft_model, why is None)


def _rehearse(read: Equipped, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    causal_lm, peft_model = read.causal_lm, read.peft_model
    state = causal_lm.state_dict() if peft_model is None else base_of(causal_lm, causal_lm.state_dict())
    rehearse(causal_lm, state, tokenizer, trust_remote_code=recipe.model.trust_remote_code, peft_model=peft_model)


def _quantized(recipe: Recipe, device: torch.device, compute_dtype: torch.dtype, unused: list[str]) -> Equipped:
    """The model with a base in 4 bits, which every process reads and quantizes for itself."""
    mine = _equip(load_quantized(recipe.model, compute_dtype, device), recipe, device, False, unused)
    mine.causal_lm.to(device)  # the adapters
    return mine


def _shell(recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    config, generation_config = load_configs(recipe.model)
    causal_lm = shell(config, dtype, recipe.model.trust_remote_code, **attention_keyword(recipe.model))
    causal_lm.generation_config = generation_config
    return causal_lm


def _equip(
    causal_lm: PreTrainedModel, recipe: Recipe, device: torch.device, sharded: bool, unused: list[str] | None
) -> Equipped:
    """Give a model adapters and fast passes, freeze what text does not reach, and learn why it can't compute packed
    rows, if so. ``unused`` is None for the model that was read: it is found out then, and the log tells of passes."""
    if recipe.model.disable_dropout:
        turn_off_dropout(causal_lm)
    torch.manual_seed(key(recipe.training.seed, Stream.ADAPTERS.value) >> 1)
    peft_model = add_adapters(causal_lm, recipe.model.lora) if recipe.model.lora else None
    says = unused is None
    unused = freeze_unused(LogprobLM(causal_lm), unused)
    if recipe.model.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    route_in_compute_type(causal_lm)
    cannot_pack = kernels.install(
        causal_lm, device, trains=True, alone=not sharded, wanted=recipe.model.kernels, says=says
    )
    return Equipped(causal_lm, peft_model, cannot_pack, unused)
