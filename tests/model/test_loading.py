"""A folder that is not one whole model is refused when it is read, in one message; nothing of it is made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.export import rehearse
from grpo.model.loading import load_configs, load_tokenizer, load_weights

HEAD, EMBEDDING, UP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def without_a_layer(tensors: Tensors) -> None:
    del tensors[UP]


def without_layers(tensors: Tensors) -> None:
    """As of a classifier, or another architecture."""
    for name in [name for name in tensors if name != EMBEDDING]:
        tensors[f"other.{name}"] = tensors.pop(name)


def with_another_head(tensors: Tensors) -> None:
    tensors[HEAD] = 2 * tensors[EMBEDDING]


def with_another_shape(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP][:-1].clone()


def changed(tiny_model: Path, folder: Path, change: Callable[[Tensors], None]) -> ModelConfig:
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(name=str(folder))


def with_config(tiny_model: Path, folder: Path, **content: object) -> ModelConfig:
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | content))
    return ModelConfig(name=str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_layer, rf"1 of the weights that its configuration asks for are not there, such as {UP}"),
        (without_layers, r"\d+ of the weights that its configuration asks for are not there"),
        (with_another_head, rf"{HEAD} and {EMBEDDING} of LlamaForCausalLM are one weight .*two that differ"),
        (with_another_shape, "can't load the weights of .*RuntimeError"),
    ],
)
def test_files_that_are_not_the_model_that_their_configuration_tells_of_are_refused(
    change: Callable[[Tensors], None], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    """transformers fills gaps at random, and leaves a head of its own to a model whose configuration ties it."""
    with pytest.raises(UserError, match=rf"^model\.name: .*{message}"):
        load_weights(changed(tiny_model, tmp_path / "model", change), torch.float32)


def test_a_head_without_tie_that_the_files_lack_is_not_made_up(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"1 of the weights that its configuration asks for are not there, such as {HEAD}"
    ):
        load_weights(with_config(tiny_model, tmp_path / "model", tie_word_embeddings=False), torch.float32)


def test_a_tied_weight_may_be_in_the_files_twice(tiny_model: Path, tmp_path: Path) -> None:
    model = changed(tiny_model, tmp_path / "model", lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    causal_lm = load_weights(model, torch.float32)
    assert causal_lm.get_output_embeddings().weight is causal_lm.get_input_embeddings().weight


@pytest.mark.parametrize(
    "load", [load_configs, lambda model: load_weights(model, torch.float32)], ids=["configs", "weights"]
)
@pytest.mark.parametrize("whole", [True, False], ids=["beside a model", "alone"])
def test_an_adapter_in_place_of_a_model_is_refused(
    load: Callable[[ModelConfig], object], whole: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """transformers would wrap the layers of a model beside it, and train nothing."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not whole:
        (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"model\.name: .* holds an adapter .*merge_and_unload"):
        load(ModelConfig(name=str(folder)))


def test_whatever_a_model_raises_as_it_is_made_is_one_message(tiny_model: Path, tmp_path: Path) -> None:
    """A rope that its class does not know, in an old configuration's spelling."""
    rope = {"rope_parameters": None, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    with pytest.raises(UserError, match=r"model\.name: can't load the weights of .*: KeyError: 'mrope'"):
        load_weights(with_config(tiny_model, tmp_path / "model", **rope), torch.float32)


def test_a_tokenizer_that_final_would_not_give_back_is_told_of(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers takes a class by the model's type for some, whatever is written beside the tokenizer."""
    causal_lm = load_weights(ModelConfig(name=str(tiny_model)), torch.float32)
    tokenizer = load_tokenizer(ModelConfig(name=str(tiny_model)))
    rehearse(causal_lm, causal_lm.state_dict(), tokenizer, trust_remote_code=False)
    assert "model.tokenizer" not in caplog.text
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", vocab_size=len(tokenizer), **sizes))
    rehearse(other, other.state_dict(), tokenizer, trust_remote_code=False)
    assert "will read the tokenizer in final/ as Qwen2Tokenizer" in caplog.text
