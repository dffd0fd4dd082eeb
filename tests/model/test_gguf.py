"""A GGUF file written here, with 8-bit weights, becomes an ordinary model: same numbers, same tokenizer, trainable."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.errors import UserError
from grpo.model.gguf import check_tokenizer, check_weights, convert, load_gguf, main

HIDDEN, HEADS, FEED_FORWARD = 64, 2, 96
TOKENS = [*sorted(ByteLevel.alphabet()), "ab", "cd", "<|end|>"]
SHAPES = {
    "token_embd": (len(TOKENS), HIDDEN),
    "blk.0.attn_q": (HIDDEN, HIDDEN),
    "blk.0.attn_k": (HIDDEN, HIDDEN),
    "blk.0.attn_v": (HIDDEN, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate": (FEED_FORWARD, HIDDEN),
    "blk.0.ffn_up": (FEED_FORWARD, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, FEED_FORWARD),
    "blk.0.attn_norm": (HIDDEN,),
    "blk.0.ffn_norm": (HIDDEN,),
    "output_norm": (HIDDEN,),
}


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.NORMAL] * (len(TOKENS) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_bos_token_id(len(TOKENS) - 1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    for name, tensor in tensors().items():
        if tensor.ndim == 1:
            writer.add_tensor(f"{name}.weight", tensor)
        else:
            packed = quantize(tensor, GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tensors():
    draw = np.random.default_rng(0)
    return {name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_unpacked_and_trainable(gguf_file, dtype):
    model = load_gguf(gguf_file, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = dequantize(quantize(tensors()["blk.0.ffn_up"], GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.data, torch.from_numpy(expected).to(dtype))
    ids_BT = torch.tensor([[5, 6, 7]])
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_conversion_keeps_model_tokenizer_and_template(gguf_file, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale").touch()
    convert(gguf_file, folder)
    assert not (folder / "stale").exists()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    saved, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not hasattr(saved.config, "quantization_config")
    check_weights(load_gguf(gguf_file), saved)
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.decode(tokenizer.encode("abc  12ü", add_special_tokens=False)) == "abc  12ü"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc<|end|>"


def test_what_got_lost_is_named(gguf_file, tmp_path):
    convert(gguf_file, tmp_path / "model")
    saved, tokenizer = load_gguf(gguf_file), AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        saved.model.norm.weight[3] += 1e-3
    with pytest.raises(UserError, match=r"model\.norm\.weight did not survive"):
        check_weights(load_gguf(gguf_file), saved)
    changed = AutoTokenizer.from_pretrained(tmp_path / "model")
    changed.chat_template = None
    with pytest.raises(UserError, match="chat template did not survive"):
        check_tokenizer(tokenizer, changed)


def test_a_file_that_is_no_gguf_is_named(tmp_path, monkeypatch):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGU")
    monkeypatch.setattr(sys, "argv", ["grpo.model.gguf", str(file), str(tmp_path / "model")])
    with pytest.raises(SystemExit, match=r"broken\.gguf: "):
        main()
    assert not (tmp_path / "model").exists()
