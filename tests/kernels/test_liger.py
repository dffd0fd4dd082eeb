"""Liger's kernels in Triton's interpreter, on a CPU: `make test-liger`, which has an environment with both.

The interpreter lacks two things that these kernels use, which are put in here: scalars in floating point as arguments,
and rsqrt of CUDA's library. What it computes in bfloat16 is wrong (nan), so all is in float32.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import os
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from grpo import kernels
from grpo.kernels import liger
from grpo.model.logprob_lm import LogprobLM
from grpo.packing import collate
from grpo.types import TrainedSequence

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("liger_kernel") is None,
        reason="needs liger-kernel and triton, and TRITON_INTERPRET=1 before they are imported (make test-liger)",
    ),
]
SMALL: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "qwen2": (Qwen2Config(**SMALL), 4),  # two norms and an MLP, and the last norm
    "qwen3": (Qwen3Config(**SMALL, head_dim=16), 6),
    "llama": (LlamaConfig(**SMALL), 4),
    "gemma3": (Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=512), 7),  # its MLP is another: GELU
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    found = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return found(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    norms = importlib.import_module("liger_kernel.ops.rms_norm")
    monkeypatch.setattr(norms, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(liger, "DEVICES", {"cpu"})
    monkeypatch.setattr(liger, "NARROW", torch.float32)


def gradients(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    one = TrainedSequence([5, 6, 7], [8, 9, 10, 11], [0.0] * 4, 1.0)
    logps_BT = LogprobLM(model).train()(collate([one], pad_token_id=0, packed=False), 1.0)[0]
    (logps_BT * torch.arange(logps_BT.numel()).view_as(logps_BT).cos()).sum().backward()
    return logps_BT.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_results_and_gradients_are_the_models_own(
    name: str, checkpointing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config, parts = MODELS[name]
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    for module in plain.modules():  # weights of 1 would hide what is done with them
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data.uniform_(0.5, 1.5)
    fused = copy.deepcopy(plain)
    if checkpointing:
        fused.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kernels.install(fused, CPU, trains=True, alone=True, wanted=["liger"])
    assert f"Liger computes {parts} norms and gated MLPs" in caplog.text
    (expected, of_plain), (logps_BT, of_fused) = (gradients(model) for model in (plain, fused))
    torch.testing.assert_close(logps_BT, expected, atol=1e-5, rtol=0)
    assert float((of_fused - of_plain).norm()) < 1e-5 * float(of_plain.norm())
    assert not torch.equal(of_fused, of_plain)  # it was Liger


def test_a_norm_that_is_another_is_left_alone() -> None:
    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight

    odd = OddRMSNorm()

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + 1e-6) * weight

    assert liger.norm_of(odd, forward, CPU) is None
    assert liger.gated_of(lambda gate, up: torch.nn.functional.gelu(gate) * up, CPU) is None
    assert liger.gated_of(lambda gate, up: torch.nn.functional.silu(gate) * up, CPU) is not None


def test_a_wrong_gradient_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel on a GPU that it does not work on: a result that is right, a gradient that is not."""
    found = liger._ops()
    wrong = found._replace(gated_backward=lambda *given: tuple(1.1 * x for x in found.gated_backward(*given)))
    monkeypatch.setattr(liger, "_ops", lambda: wrong)
    assert liger.gated_of(lambda gate, up: torch.nn.functional.silu(gate) * up, CPU) is None
