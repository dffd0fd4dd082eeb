"""What a class of transformers must be to be trained: found, or refused by name, when the policy is made."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.loading import PlainText, load_configs, load_weights
from grpo.model.logprob_lm import LogprobLM
from grpo.model.policy import Policy
from tests.conftest import make_policy
from tests.gradient_of_step import sequences

SIZE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256}
SIZE |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
LLAMA4 = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "attention_chunk_size": 8}


def model_of(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE | settings))


def of_update_and_own(policy: Policy) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The log-probabilities of completions in the update, and in the model's own forward pass, row by row."""
    rows = sequences()
    with torch.no_grad():
        logps_BT = policy.model(policy.collate(rows), 1.0)[0]
        policy.causal_lm.eval()
        own = []
        for row in rows:
            ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
            logps_TV = policy.causal_lm(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            targets = torch.tensor(row.completion_ids)[:, None]
            own.append(logps_TV[len(row.prompt_ids) - 1 : -1].gather(1, targets)[:, 0])
    return [logps_BT[i, : len(row.completion_ids)] for i, row in enumerate(rows)], own


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama4_text", LLAMA4),  # its base_model_prefix names no part of it
        ("bert", {"is_decoder": True}),  # its head has layers before the matrix
        ("recurrent_gemma", {"logits_soft_cap": 0.5, "lru_width": 64, "attention_window_size": 8}),
    ],
)
def test_a_class_with_other_parts_is_computed_as_it_computes_itself(
    kind: str, settings: dict[str, Any], tiny_model: Path
) -> None:
    update, own = of_update_and_own(make_policy(tiny_model, causal_lm=model_of(kind, **settings)))
    for ours, expected in zip(update, own, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_a_class_without_last_hidden_state_is_refused_by_name(tiny_model: Path) -> None:
    model = model_of("llama")
    forward = type(model.model).forward
    model.model.forward = lambda *args, **kw: SimpleOutput(forward(model.model, *args, **kw))
    with pytest.raises(UserError, match=r"model\.name: LlamaForCausalLM can't be trained: .*LlamaModel.*Take a text"):
        make_policy(tiny_model, causal_lm=model)


class SimpleOutput:
    def __init__(self, output: Any):
        self.hidden = output.last_hidden_state


def test_an_encoder_is_refused_as_one_that_sees_what_comes_after(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"BertLMHeadModel gives a token other logits.*is_decoder: true"):
        make_policy(tiny_model, causal_lm=model_of("bert"))


def test_a_soft_cap_is_found_while_logits_are_small() -> None:
    """Logits of up to 2 are moved by a cap of 30 by a few thousandths, and those of a trained model by far more."""
    model = model_of("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)
    scored = LogprobLM(model)
    scored.check()
    whole = type(model).forward
    model.forward = lambda **kw: capped(whole(model, **kw))
    with pytest.raises(UserError, match="turns hidden states into logits"):
        scored.check()


def capped(output: Any) -> Any:
    output.logits = 30 * torch.tanh(output.logits / 30)
    return output


@pytest.mark.parametrize("pad", [None, 5000])
def test_a_pad_token_that_has_no_embedding_pads_by_another(pad: int | None, tiny_model: Path) -> None:
    """Of a tokenizer that has neither a pad token nor an end, or one that the model was never enlarged for."""
    policy = make_policy(tiny_model)
    policy.packed = False
    expected = policy.logprobs(policy.collate(sequences()), 1.0)[0]

    class Tokenizer(type(policy.tokenizer)):  # type: ignore[misc]
        pad_token_id = pad

    policy.tokenizer.__class__ = Tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.conftest.load_tokenizer", lambda _: policy.tokenizer)
        other = make_policy(tiny_model)
    other.packed = False
    torch.testing.assert_close(other.logprobs(other.collate(sequences()), 1.0)[0], expected)


def test_a_configuration_whose_pad_token_has_no_embedding_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    model = model_of("llama")
    model.config.pad_token_id = 5000
    model.save_pretrained(tmp_path)
    section = ModelConfig(name=str(tmp_path))
    assert load_configs(section)[0].pad_token_id is None
    loaded = load_weights(section, torch.float32)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_folder_of_broken_files_is_the_users_mistake_and_told_in_a_line(tmp_path: Path) -> None:
    """Whatever transformers raises: weights that lack a layer would be random, and those of nan train nothing."""
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    section, weights = ModelConfig(name=str(tmp_path)), tmp_path / "model.safetensors"
    config, whole = (tmp_path / "config.json").read_text(), weights.read_bytes()

    def refusal(load: Any, *arguments: Any) -> str:
        with pytest.raises(UserError) as caught:
            load(section, *arguments)
        return str(caught.value)

    for text, said in (
        ("[]", "model_type"),
        (config.replace('"hidden_size": 64', '"hidden_size": "x"'), "Field 'hidden_size' expected int"),
        (config.replace('"dtype": "float32"', '"dtype": "float99"'), "float99"),
    ):
        (tmp_path / "config.json").write_text(text)
        message = refusal(load_configs)
        assert "can't load the configuration of" in message
        assert said in message
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    assert "9 of the weights that its configuration asks for are not there" in refusal(load_weights, torch.float32)
    (tmp_path / "config.json").write_text(config)
    for content in (whole[: len(whole) // 2], b"", b"\xff" * 8 + whole[8:]):
        weights.write_bytes(content)
        assert "can't load the weights of" in refusal(load_weights, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"logits of this LlamaForCausalLM are nan; model.layers.1.mlp.up_proj.weight"):
        LogprobLM(model).check()


def test_a_table_of_weights_cannot_steer_the_terminal() -> None:
    record = logging.LogRecord("transformers", logging.WARNING, "", 0, "\x1b[1mREPORT\x1b[0m model.\x1b[2J", None, None)
    handlers = logging.getLogger("transformers").handlers  # pytest adds its own
    (handler,) = (handler for handler in handlers if isinstance(handler.formatter, PlainText))
    assert handler.format(record) == "[transformers] REPORT model.\\x1b[2J"
