"""Keeping less of the forward pass changes no gradient, and is what is kept."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP

from grpo.kernels import elementwise, lean_activations
from grpo.kernels.lean_activations import install
from grpo.model.logprob_lm import LogprobLM
from grpo.packing import collate
from grpo.types import TrainedSequence
from grpo.update.micro_batch_size import kept_per_token
from tests.conftest import make_policy
from tests.gradient_of_step import sequences

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 300, "n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, query_pre_attn_scalar=16),
    "gpt2": GPT2Config(**GPT2),
}


class OtherMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).tanh())


class Alive(TorchDispatchMode):
    """Within it, finds the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def pair(config: Any, lora: bool = False) -> tuple[LogprobLM, LogprobLM]:
    """A model in training, and the same that keeps less."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for name, parameter in plain.named_parameters():
        if "norm" in name or "ln_" in name:
            nn.init.normal_(parameter, 1.0, 0.2)
    if lora:
        targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
        inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), plain)
    lean = copy.deepcopy(plain)
    install(lean)
    return LogprobLM(plain).train(), LogprobLM(lean).train()


def loss(scored: LogprobLM, batch: list[TrainedSequence], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A sum of log-probabilities in which every one has another weight."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logps_BT = scored(collate(batch, pad_token_id=0, packed=False), 0.9)[0]
    return (logps_BT * torch.arange(logps_BT.numel()).view_as(logps_BT).cos()).sum()


def gradient(scored: LogprobLM) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in scored.parameters() if p.grad is not None])
    scored.zero_grad()
    return found


def assert_same(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """To rounding: what a tensor's readers send back is added in another order. In bfloat16 that turns over a number
    here and there, by 0.004 of it."""
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    assert float((found - expected).norm()) < tolerance * float(expected.norm())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_same(name: str, dtype: torch.dtype, checkpointing: bool) -> None:
    plain, lean = pair(CONFIGS[name])
    found = []
    for scored in (plain, lean):
        if checkpointing:
            scored.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        values = [loss(scored, batch, dtype) for batch in (sequences(), sequences()[:3])]
        for value in values:  # two micro-batches, both graphs there at a time
            value.backward()
        found.append((torch.stack(values).detach(), gradient(scored)))
    assert_same(found[1][0], found[0][0], dtype)
    assert_same(found[1][1], found[0][1], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_adapters_are_the_same(dtype: torch.dtype) -> None:
    plain, lean = pair(CONFIGS["llama"], lora=True)
    for scored in (plain, lean):
        for name, parameter in scored.named_parameters():
            parameter.requires_grad_("lora" in name)
            if dtype == torch.bfloat16 and "lora" not in name:
                parameter.data = parameter.data.to(dtype)
        loss(scored, sequences(), dtype).backward()
    assert_same(gradient(lean), gradient(plain), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "lora", "share"),
    [("float32", None, 0.6), ("bfloat16", None, 0.55), ("bfloat16", {"r": 4, "target_modules": "all-linear"}, 0.6)],
)
def test_a_token_keeps_half_as_much(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, lora: dict | None, share: float
) -> None:
    """As ``micro_batch_size`` measures it and as tensors are alive."""
    section = {"model": {"lora": lora}} if lora else {}

    def kept() -> tuple[float, float]:
        policy = make_policy(tiny_model, dtype=dtype, **section)
        alive = []
        for tokens in (64, 192):
            batch = policy.collate([TrainedSequence([1] * (tokens - 4), [2] * 4, [0.0] * 4, 1.0)])
            with Alive() as found:
                logps_BT = policy.logprobs(batch, 1.0)[0]
                alive.append(found.bytes())
            del logps_BT
        return kept_per_token(policy), (alive[1] - alive[0]) / 128

    less = kept()
    monkeypatch.setattr(lean_activations, "install", lambda *_: 0)
    plain = kept()
    assert less[0] < share * plain[0]
    assert less[1] < share * plain[1]
    assert less[0] == pytest.approx(less[1], rel=0.1)


def test_the_share_is_that_of_the_formula() -> None:
    """8 H + 2 K + 4 M floats a layer become 4 H + 2 K + 2 M."""
    found = []
    for scored in pair(CONFIGS["llama"]):
        alive = []
        for tokens in (64, 192):
            ids = torch.ones((1, tokens), dtype=torch.long)
            with Alive() as made:
                out = scored.causal_lm.base_model(ids, use_cache=False)
                alive.append(made.bytes())
            del out
        found.append((alive[1] - alive[0]) / 128 / 4)
    H, K, M, layers = 48, 16, 128, 2
    assert found[0] - found[1] == pytest.approx(layers * (4 * H + 2 * M) + H, rel=0.05)  # and the last norm
    assert found[1] == pytest.approx(layers * (4 * H + 2 * K + 2 * M) + 2 * H, rel=0.2)


def test_nothing_outlives_its_graph() -> None:
    _, lean = pair(CONFIGS["llama"])
    weights = sum(p.numel() * p.element_size() for p in lean.parameters())  # views of them are made
    gc.collect()
    gc.disable()
    try:
        with Alive() as found:
            value = loss(lean, sequences())
            assert found.bytes() > 2 * weights
            value.backward()
            lean.zero_grad()
            assert found.bytes() < weights + 100
            dropped = loss(lean, sequences())
            del dropped
            assert found.bytes() < weights + 100
    finally:
        gc.enable()


def test_a_second_backward_pass_gives_the_same_or_raises() -> None:
    _, lean = pair(CONFIGS["llama"])
    value = loss(lean, sequences())
    value.backward(retain_graph=True)
    first = gradient(lean)
    value.backward()
    assert torch.equal(gradient(lean), first)
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()


@pytest.mark.parametrize("name", ["gate_proj", "self_attn.o_proj", "self_attn.q_proj"])
def test_overwriting_what_is_kept_is_noticed(name: str) -> None:
    """With hooks autograd does not look; o_proj's output becomes a residual, which a sum does not need: no error."""
    raised = []
    for scored in pair(CONFIGS["qwen3"]):
        kept = []
        layer = scored.causal_lm.base_model.layers[0]
        layer.get_submodule(name if "." in name else f"mlp.{name}").register_forward_hook(
            lambda _module, _args, out, kept=kept: kept.append(out)
        )
        value = loss(scored, sequences())
        with torch.no_grad():
            kept[0].mul_(2.0)
        try:
            value.backward()
            raised.append(None)
        except RuntimeError as error:
            raised.append("modified by an inplace operation" in str(error))
    assert raised[1] == raised[0]
    assert raised[0] == (None if name == "self_attn.o_proj" else True)


def test_an_output_that_was_overwritten_is_kept_as_it_is() -> None:
    """A norm's output that is doubled in place before layers read it."""
    found = []
    for scored in pair(CONFIGS["llama"]):
        for layer in scored.causal_lm.base_model.layers:
            layer.input_layernorm.register_forward_hook(lambda _module, _args, out: out.mul_(2.0))
            layer.post_attention_layernorm.register_forward_hook(lambda _module, _args, out: out.view(-1).mul_(0.5))
            layer.post_attention_layernorm.register_forward_hook(lambda _module, args, out: out.view_as(args[0]))
        loss(scored, sequences()).backward()
        found.append(gradient(scored))
    assert_same(found[1], found[0])


def test_an_mlp_of_other_mathematics_is_left_alone() -> None:
    plain = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    for layer in plain.base_model.layers:
        layer.mlp.__class__ = OtherMLP
    lean = copy.deepcopy(plain)
    install(lean)
    assert not any("forward" in vars(layer.mlp) for layer in lean.base_model.layers)
    for causal_lm in (plain, lean):
        loss(LogprobLM(causal_lm).train(), sequences()).backward()
    assert_same(gradient(LogprobLM(lean)), gradient(LogprobLM(plain)))


def test_only_training_with_gradients_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lean = pair(CONFIGS["llama"])

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(lean_activations.Recomputed, "apply", never)
    monkeypatch.setattr(lean_activations, "_pack", never)
    with torch.no_grad():
        loss(lean, sequences())
    loss(lean.eval(), sequences()).backward()
    with pytest.raises(AssertionError):
        loss(lean.train(), sequences())


def test_gated_mlps_are_known_where_there_are_no_numbers_yet() -> None:
    """On the meta device, where large models are made."""
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    install(made)
    assert all("forward" in vars(layer.mlp) for layer in made.model.layers)


def test_compiled_code_takes_no_shapes_that_it_would_read_beyond() -> None:
    x_TH, weight_H = torch.zeros(3, 64), torch.ones(64)
    norm, gated = elementwise.Norm(1e-6), elementwise.Gated()
    assert norm.takes(x_TH, weight_H)
    assert not norm.takes(x_TH[:, :1].contiguous(), weight_H)  # torch repeats the one number
    assert not norm.takes(x_TH, weight_H[:1])
    assert gated.takes(x_TH, x_TH)
    assert not gated.takes(x_TH, x_TH[:1])
