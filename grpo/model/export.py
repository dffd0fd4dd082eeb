"""The folder that a run ends with: what ``from_pretrained`` loads. And its rehearsal before the first step.

transformers checks more when it writes than when it reads, so what a model came with may be refused after the last
step. All but the weights is therefore written once at the start.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from grpo.errors import RunError, UserError, first_line
from grpo.files import usual_modes, whole_folder, why_not_written, write_whole
from grpo.model.dropout import config_as_read
from grpo.model.placing import shell

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("grpo")

TRIED_TOKENS = 100  # of a tokenizer's, at least, where two are compared

State = dict[str, torch.Tensor]


def write_final(
    folder: Path,
    like: PreTrainedModel,
    state: State,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool,
    peft_model: Any = None,
    adapter: State | None = None,
    card: str | None = None,
) -> None:
    """Write a folder that ``from_pretrained`` loads, whole or not at all: ``state`` in a model of the configuration of
    ``like``, the adapter alone in its adapter/, and ``card`` as its README.md.

    Raises:
        RunError: the disk refuses. A folder of this name is as it was.
    """
    needed = sum(tensor.nbytes for tensor in [*state.values(), *(adapter or {}).values()])
    try:
        with whole_folder(folder) as aside:
            _holding(like, state, dtype, trust_remote_code).save_pretrained(aside)
            _write_generation_config(aside, like)
            tokenizer.save_pretrained(aside)
            if adapter is not None:
                write_adapter(aside / "adapter", peft_model, adapter)
            if card is not None:
                write_whole(aside / "README.md", card)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # where a write fails, libraries raise errors of their own
        raise RunError(
            f"could not write {folder}: {why_not_written(folder, error, needed)}. No step is lost: the last checkpoint "
            "has them all. Free some space or raise the quota, then give --resume, which writes it without another "
            "step."
        ) from error


def write_adapter(folder: Path, peft_model: Any, adapter: State) -> None:
    """Write an adapter as peft does. Without ``save_embedding_layers=False`` it would add what an adapter of an
    embedding is added to, and ask a hub for the size of the vocabulary."""
    peft_model.save_pretrained(folder, state_dict=adapter, save_embedding_layers=False)
    usual_modes(folder)


def rehearse(
    like: PreTrainedModel,
    state: State,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool,
    peft_model: Any = None,
) -> None:
    """Write all that ``write_final`` will write but weights, of which the names and ties are compared.

    Raises:
        UserError: something of it would be refused. The log says what is mended.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    part = "weights"
    try:
        with tempfile.TemporaryDirectory(prefix="grpo-rehearsal-") as name:
            folder = Path(name)
            twin = _holding(like, state, torch.float32, trust_remote_code)
            remove_tied_weights_from_state_dict(twin.state_dict(), twin)
            part = "configuration"
            twin.config.save_pretrained(folder)
            part = "generation configuration"
            if why := _write_generation_config(folder, like):
                log.warning("model.name: its generation configuration goes into final/ as it is, though: %s", why)
            part = "tokenizer"
            tokenizer.save_pretrained(folder)
            read_back = _read_back(folder, trust_remote_code)
            part = "adapter"
            if peft_model is not None:
                write_adapter(folder / "adapter", peft_model, {})
    except Exception as error:  # whatever a library says
        raise UserError(
            f"model.name: the {part} of this model can't be written, so the run would end without its final/: "
            f"{first_line(error)}"
        ) from error
    if read_back is not None and (text := _told_apart(tokenizer, read_back)):
        log.warning(
            "model.tokenizer: for a model of type %s, transformers will read the tokenizer in final/ as %s, which "
            "makes other tokens of %r than the one that is trained with (%s). Name that one wherever final/ is used",
            *(like.config.model_type, type(read_back).__name__, text[:40], type(tokenizer).__name__),
        )


def _read_back(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer that ``from_pretrained`` makes of a folder; None where it can't, which the log tells."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # such as code of its own on a hub that is not reached now
        log.warning("model.tokenizer: it was not read back as final/ will hold it: %s", first_line(error))
        return None


def _told_apart(one: PreTrainedTokenizerBase, other: Any) -> str | None:
    """A text of which two tokenizers make different tokens, if one is found among the words of the first."""
    some = range(0, len(one), max(1, len(one) // TRIED_TOKENS))
    words = [one.decode([token], skip_special_tokens=True) for token in some]
    return next((t for t in [" ".join(words), *words] if one.encode(t) != other.encode(t)), None)


def _holding(like: PreTrainedModel, state: State, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import GenerationConfig

    twin = shell(_without_generation(config_as_read(like)), dtype, trust_remote_code)
    twin.load_state_dict(state, assign=True)
    twin.tie_weights()
    twin.generation_config = GenerationConfig()  # one that can be written; the model's own follows
    return twin


def _without_generation(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration without settings of generation, which older ones hold and newer ones may not be saved with.
    ``generation_config`` has them."""
    config = copy.deepcopy(config)
    for name in config._get_generation_parameters() if hasattr(config, "_get_generation_parameters") else ():
        vars(config).pop(name, None)
    return config


def _write_generation_config(folder: Path, like: PreTrainedModel) -> str | None:
    """Write the model's generation configuration, if it has one, as it is. Returns what transformers finds wrong."""
    config: GenerationConfig | Any = like.generation_config
    if config is None:
        return None
    try:
        config.save_pretrained(folder)
    except ValueError as error:
        config.to_json_file(folder / "generation_config.json")
        return " ".join(str(error).split())[:300]
    return None
