"""Tokenizer, configuration and weights of ``model:``, from a hub id, a folder or a GGUF file."""

from __future__ import annotations

import difflib
import logging
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from grpo.config import ModelConfig
from grpo.config.find import locate
from grpo.errors import UserError, first_line, printable
from grpo.model.gguf import load_gguf, whole
from grpo.model.quantized import quantization_config, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

COLOURS = re.compile("\x1b\\[[0-9;]*m")


class PlainText(logging.Formatter):
    """transformers colours its tables of weights, whose names are a stranger's text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(COLOURS.sub("", super().format(record)))


transformers_logging.disable_progress_bar()  # a loading bar would fill the screen, in a log of one line per step
for _handler in logging.getLogger("transformers").handlers:
    _handler.setFormatter(PlainText("[transformers] %(message)s"))


def _source(name: str, model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Arguments of ``from_pretrained``: a folder or hub id, and keywords."""
    name = locate(name)
    keywords: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        return str(path.parent), keywords | {"gguf_file": path.name}
    if model.revision:
        keywords["revision"] = model.revision
    return name, keywords


ADAPTER = "adapter_config.json"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
OUR_FOLDERS = ("data", "models", "runs")  # the first part of a name that means a folder, and no hub's organization
SECONDS_FOR_HUB = 10.0


def is_local(name: str) -> bool:
    """Whether a model's name means something on disk, by its form and by what is there, rather than a hub id."""
    path = Path(locate(name)).expanduser()
    if path.exists() or path.suffix == ".gguf" or name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        return True
    return path.parts[0] in OUR_FOLDERS or (len(path.parts) == 2 and path.parent.is_dir() and not _in_cache(name))


def still_to_come(name: str) -> bool:
    """Whether a name that does not load here may do so later: a hub id, or what another run is to leave."""
    return not is_local(name) or (Path(name).name == "final" and not Path(name).expanduser().exists())


@contextmanager
def _named(what: str, name: str) -> Iterator[None]:
    """Turn the many ways a model can fail to load into one message that says what to do. Code that comes with a model,
    and a configuration that transformers does not expect, may raise anything."""
    if is_local(name) and not Path(locate(name)).expanduser().exists():
        raise UserError(
            f"model.name: {name} does not exist (from {Path.cwd()}){_did_you_mean(name)}; give a folder that holds "
            "config.json and weights, a GGUF file or a hub id. A stage that starts from another run needs that run's "
            "final/ first, and where a model is made here the recipe's header says how"
        )
    if not is_local(name) and not _in_cache(name) and (why := _why_no_hub()):
        raise UserError(
            f"model.name: {name} is no folder here (from {Path.cwd()}){_did_you_mean(name)}, it was not downloaded "
            f"before, and the hub can't be reached: {why}"
        )
    if (Path(locate(name)) / ADAPTER).exists():
        raise UserError(
            f"model.name: {name} holds an adapter ({ADAPTER}), which is not trained on. Name a folder with whole "
            "weights: the final/ around the adapter/ of a run of grpo's, or what peft's merge_and_unload gives"
        )
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers and its readers of files make of a broken one
        near = "" if is_local(name) else _did_you_mean(name)
        raise UserError(f"model.name: can't load the {what} of {name}{near}: {_why(error)}") from error


def _why(error: Exception) -> str:
    """What an error says, in a line; the next one too where the first only announces it. Errors that are not made for
    people say less than their class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)
    return said if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {said}"


def _did_you_mean(name: str) -> str:
    """``, did you mean …?`` with the folders of models and GGUF files nearest to a name; empty where none is near."""
    places = [(Path(), ""), (Path(name).expanduser().parent, ""), (Path(__file__).parents[2] / "data", "data/")]
    known = set()
    for place, prefix in places:
        for pattern in ("*/config.json", "*/*/config.json", "*/*/final/config.json", "*.gguf", "*/*.gguf"):
            found = (file.parent if file.name == "config.json" else file for file in place.glob(pattern))
            known |= {prefix + str(path.relative_to(place)) if prefix else str(path) for path in found}
    guesses = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.7)
    return f", did you mean {' or '.join(guesses)}?" if guesses else ""


def _in_cache(name: str) -> bool:
    """Whether a hub's model was downloaded before."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no id that a hub would take
        return False


@cache
def _why_no_hub() -> str | None:
    """Why the hub can't be reached, found out once; its own client would try for a minute, file by file."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_FOR_HUB)
    except Exception as error:  # whatever its client raises
        return f"{constants.ENDPOINT}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
    return None


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer; a missing pad token becomes the end-of-sequence token (padding never counts anywhere)."""
    name = model.tokenizer or model.name
    source, keywords = _source(name, model)
    with _named("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(source, **keywords)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _config(source: str, keywords: dict[str, Any]) -> tuple[PreTrainedConfig, bool]:
    """The model configuration, and whether it is not as the source has it: without a pad token that the embedding does
    not have, for which torch would refuse to make one."""
    config = AutoConfig.from_pretrained(source, **keywords)
    text = config.get_text_config(decoder=True)
    pad = getattr(text, "pad_token_id", None)
    outside = isinstance(pad, int) and not 0 <= pad < getattr(text, "vocab_size", pad + 1)
    if outside:
        text.pad_token_id = config.pad_token_id = None
    return config, outside


def _weights(source: str, keywords: dict[str, Any], **more: Any) -> PreTrainedModel:
    """The causal LM that ``from_pretrained`` makes, if every weight of it comes from the files.

    Raises:
        UserError: transformers would fill the gaps at random, or its configuration ties what differs in the files, so
            that copies made by that configuration, and what is read back from ``final/``, would be other models.
    """
    names = ("trust_remote_code", "revision")
    config, mended = _config(source, {name: keywords[name] for name in names if name in keywords})
    if mended:
        more["config"] = config
    causal_lm = whole(*AutoModelForCausalLM.from_pretrained(source, **keywords, **more, output_loading_info=True))
    for one, other in causal_lm.get_expanded_tied_weights_keys(all_submodels=True).items():
        if causal_lm.get_parameter(one) is not causal_lm.get_parameter(other):
            raise UserError(
                f"model.name: by its configuration, {one} and {other} of {type(causal_lm).__name__} are one weight "
                f"(tie_word_embeddings), but the files in {source} hold two that differ. Set tie_word_embeddings to "
                "false in its config.json, or take one of the two out"
            )
    return causal_lm


def load_configs(model: ModelConfig) -> tuple[PreTrainedConfig, GenerationConfig]:
    """The model configuration and the generation configuration (made from the former where the source has none)."""
    source, keywords = _source(model.name, model)
    with _named("configuration", model.name):
        config, _ = _config(source, keywords)
    with _named("generation configuration", model.name):
        try:
            generation_config = GenerationConfig.from_pretrained(source, revision=model.revision or "main")
        except OSError:
            generation_config = GenerationConfig.from_model_config(config)
    return config, generation_config


def attention_keyword(model: ModelConfig) -> dict[str, str]:
    return {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}


def load_weights(model: ModelConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """The causal LM in ``dtype``, or (None) in the type that its weights are stored in; on the CPU.

    Raises UserError where it can't be loaded, or its weights stay quantized, though the recipe does not ask for that.
    """
    source, keywords = _source(model.name, model)
    keywords |= attention_keyword(model)
    with _named("weights", model.name):
        if file := keywords.pop("gguf_file", None):
            return load_gguf(Path(source) / file, dtype or torch.float32, **keywords)
        causal_lm = _weights(source, keywords, dtype=dtype or "auto")
    quantizer = getattr(causal_lm, "hf_quantizer", None)  # gone where transformers has dequantized what it read
    if quantizer is not None and not model.load_in_4bit:
        method = quantizer.quantization_config.quant_method
        raise UserError(
            f"model.name: the weights of {model.name} are quantized ({getattr(method, 'value', method)}), so they "
            "can't be trained, nor adapters merged into them; name the model that they were made from (with "
            "model.load_in_4bit for LoRA over 4 bits)"
        )
    return causal_lm


def load_quantized(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The causal LM with linear layers in 4 bits and the rest in ``dtype``, on ``device``, where it is quantized."""
    source, keywords = _source(model.name, model)
    keywords |= attention_keyword(model) | {"quantization_config": quantization_config(dtype)}
    with _named("weights", model.name):
        causal_lm = _weights(source, keywords, dtype=dtype, device_map={"": device})
    settle(causal_lm)
    return causal_lm
