"""The compiled decoding step: the numbers of transformers, whatever is decoded beside, and what happens without it."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grpo.backends.base import Request, Sampling
from grpo.backends.hf import step_compiled
from grpo.backends.hf.attention import decoding_into
from grpo.backends.hf.backend import HFBackend
from grpo.backends.hf.buffers import Prefill
from grpo.backends.hf.kv_cache import DecodeCache, Shape
from grpo.backends.hf.step_compiled import DecodeStep, why_not
from grpo.kernels import elementwise, native, packed_attention_compiled
from grpo.randomness import key
from grpo.types import Prompt
from tests.conftest import make_policy

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
V, STEPS = 97, 20
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "vocab_size": V,
    "max_position_embeddings": 512,
}
KINDS = {
    "llama": SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": SMALL | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 96, "tie_word_embeddings": True},
    "mistral": SMALL | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128, "sliding_window": None},
}
REFUSED = {
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2}, "GPT2LMHeadModel"),
    "gemma2": (SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}, "Gemma2ForCausalLM"),
    "mistral": (SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16}, "sliding window"),
    "qwen3": (SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}, "heads of 8"),
    "llama": (SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "mlp_bias": True}, "SwiGLU"),
    "llama3": (SMALL | {"num_attention_heads": 4, "attention_bias": True}, "output bias"),
}


def make(kind: str, settings: dict) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = {"llama3": "llama"}.get(kind, kind)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, pad_token_id=0, eos_token_id=1, **settings)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases begin as ones and zeros, which would hide them
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits_of(
    model: PreTrainedModel, prompt_of: list[int], tokens_TB: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """(T,B,V) of compiled steps that are given ``tokens_TB``; sequence b belongs to prompt ``prompt_of[b]``."""
    cache = DecodeCache(Shape(len(lengths), max(lengths), len(prompt_of), STEPS, len(prompt_of)), torch.device("cpu"))
    ids = [(torch.arange(n) * 5 + 3 + 11 * i) % V for i, n in enumerate(lengths)]
    with decoding_into(model, cache):
        for prompt in ids:  # one at a time, so that no prefill depends on another
            cache.prefill = Prefill([(0, cache.add_prompt(len(prompt)), len(prompt))])
            model.base_model(input_ids=prompt[None], use_cache=False)
            cache.prefill = None
    for i in prompt_of:
        cache.add_sequence(i)
    step = DecodeStep(model)
    return torch.stack([step(tokens_B, cache) for tokens_B in tokens_TB])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_models_own_forward_pass(kind: str) -> None:
    model, prompt_of, lengths = make(kind, KINDS[kind]), [0, 2, 1, 0, 2, 2, 0, 1, 0, 2, 1, 1, 0, 2, 2], [40, 33, 57]
    assert why_not(model) is None
    tokens_TB = torch.randint(V, (STEPS, len(prompt_of)), generator=torch.Generator().manual_seed(1))
    found_TBV = logits_of(model, prompt_of, tokens_TB, lengths)
    for b, i in enumerate(prompt_of):
        prompt = (torch.arange(lengths[i]) * 5 + 3 + 11 * i) % V
        with torch.no_grad():
            own_TV = model(input_ids=torch.cat([prompt, tokens_TB[:, b]])[None]).logits[0, -STEPS:]
        torch.testing.assert_close(found_TBV[:, b], own_TV, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_the_same_to_the_bit_whatever_is_beside_it(kind: str, dtype: torch.dtype) -> None:
    model, lengths = make(kind, KINDS[kind]).to(dtype), [40, 33]
    prompt_of = [b % 2 for b in range(29)]
    tokens_TB = torch.randint(V, (STEPS, len(prompt_of)), generator=torch.Generator().manual_seed(1))
    together_TBV = logits_of(model, prompt_of, tokens_TB, lengths)
    for some in ([0], [3, 4], list(range(5, 18)), list(range(29))[::-1]):
        found = logits_of(model, [prompt_of[b] for b in some], tokens_TB[:, some], lengths)
        assert torch.equal(found, together_TBV[:, some])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work_and_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_TB = make("llama", KINDS["llama"]), torch.full((STEPS, 5), 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = logits_of(model, [0, 1, 0, 1, 0], tokens_TB, [40, 33])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(logits_of(model, [0, 1, 0, 1, 0], tokens_TB, [40, 33]), expected)


@pytest.mark.parametrize("kind", REFUSED)
def test_models_it_does_not_know_are_left_to_transformers(kind: str) -> None:
    settings, why = REFUSED[kind]
    assert why in str(why_not(make(kind, settings)))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_nearer_to_float32_than_transformers_is(kind: str) -> None:
    model, prompt_of, length = make(kind, KINDS[kind]).bfloat16(), [0] * 7, 40
    assert why_not(model) is None
    tokens_TB = torch.randint(V, (STEPS, len(prompt_of)), generator=torch.Generator().manual_seed(1))
    found_BTV = logits_of(model, prompt_of, tokens_TB, [length]).transpose(0, 1)
    ids_BN = torch.cat([((torch.arange(length) * 5 + 3) % V).expand(7, -1), tokens_TB.T], dim=1)
    with torch.no_grad():
        theirs_BTV = model(input_ids=ids_BN).logits[:, -STEPS:].float()
        exact_BTV = model.float()(input_ids=ids_BN).logits[:, -STEPS:]
    assert (found_BTV - exact_BTV).abs().mean() <= (theirs_BTV - exact_BTV).abs().mean()
    assert (found_BTV - exact_BTV).abs().max() < 0.03 * (exact_BTV.max() - exact_BTV.min())


def test_mixed_types_and_adapters_are_left_to_transformers() -> None:
    model = make("llama", KINDS["llama"])
    model.lm_head.bfloat16()
    assert "throughout" in str(why_not(model))
    peft = pytest.importorskip("peft")
    model = make("llama", KINDS["llama"])
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert "adapters" in str(why_not(model))


@pytest.fixture
def forgotten() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    """All that was compiled, or could not be: other tests of this process ask for it too."""
    for module in (native, step_compiled, elementwise, packed_attention_compiled):
        module.library.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_eight(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU without AVX-512 compiles."""
    model, tokens_TB = make("qwen2", KINDS["qwen2"]).to(dtype), torch.arange(STEPS * 7).view(STEPS, 7) % V
    wide = logits_of(model, [0, 1, 0, 1, 0, 1, 1], tokens_TB, [40, 33])
    monkeypatch.setattr(native, "FLAGS", [flag.replace("native", "haswell") for flag in native.FLAGS])
    forget()
    assert step_compiled.library().vector_floats() == 8
    narrow = logits_of(model, [0, 1, 0, 1, 0, 1, 1], tokens_TB, [40, 33])
    torch.testing.assert_close(narrow, wide, atol=2e-5 if dtype == torch.float32 else 0.05, rtol=1e-5)


# Stands in for the instruction. A file with a fixed path: the compiled code is found again in the cache folder.
AS_VDPBF16PS = Path(__file__).with_name("as_vdpbf16ps.h")


@pytest.mark.slow
def macros_of_the_compiler() -> str:
    """What it defines for this CPU: it may be too old for an instruction, or told to do without."""
    command = [os.environ.get("CXX") or "g++", *native.FLAGS, "-dM", "-E", "-x", "c++", "/dev/null"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.skipif("avx512f" not in Path("/proc/cpuinfo").read_text(), reason="no vectors of sixteen")
@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_bfloat16_pairs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_TB = make(kind, KINDS[kind]).bfloat16(), torch.arange(STEPS * 7).view(STEPS, 7) % V

    def logits_compiled_with(*flags: str) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(native, "FLAGS", [*native.FLAGS, *flags])
            forget()
            return logits_of(model, [0, 1, 0, 1, 0, 1, 1], tokens_TB, [40, 33])

    widened = logits_compiled_with("-mno-avx512bf16")
    by_pairs = logits_compiled_with("-mno-avx512bf16", "-include", str(AS_VDPBF16PS))
    assert not torch.equal(by_pairs, widened)  # another order of sums: it is another code
    torch.testing.assert_close(by_pairs, widened, atol=0.05, rtol=1e-5)
    if "avx512_bf16" in Path("/proc/cpuinfo").read_text() and "__AVX512BF16__" in macros_of_the_compiler():
        assert torch.equal(logits_compiled_with(), by_pairs)  # the instruction itself


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
def test_bfloat16_instructions_are_used_where_there_are_some(tmp_path: Path) -> None:
    source, built = Path(step_compiled.__file__).with_suffix(".cpp"), tmp_path / "step_compiled.s"
    flags = [flag.replace("native", "cooperlake").replace("-O3", "-O1") for flag in native.FLAGS]  # faster to compile
    subprocess.run(["g++", *flags, "-S", str(source), "-o", str(built)], check=True)
    assert "vdpbf16ps" in built.read_text()


@pytest.mark.usefixtures("forgotten")
def test_without_a_compiler_a_line_says_so_and_the_rollout_goes_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO, "grpo"):
        policy = make_policy(tiny_model)
        backend = HFBackend(policy, max_batch_size=8)
    assert "through transformers, slower: there is no C++ compiler here (g++, c++)" in caplog.text
    backend.sync(policy, 0)
    assert backend.generate([Request(Prompt(0, "", "", [5, 6]), [key(0)])], Sampling(4), 0)[0][0].token_ids


@pytest.mark.usefixtures("forgotten")
def test_a_compiler_that_fails_is_named_with_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "bad++"
    compiler.write_text("#!/bin/sh\necho first >&2; echo 'unrecognized option' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert why_not(make("llama", KINDS["llama"])) == f"{compiler} failed: unrecognized option"
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.usefixtures("forgotten")
def test_it_is_compiled_once_and_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (source := tmp_path / "seven.cpp").write_text('extern "C" int seven() { return 7; }\n')
    assert native.library(source).seven() == 7
    (file,) = (tmp_path / "grpo").iterdir()
    forget()
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert native.library(source).seven() == 7
    assert list((tmp_path / "grpo").iterdir()) == [file]


@pytest.mark.usefixtures("forgotten")
def test_a_cache_folder_that_cannot_be_made_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "file" in str(why_not(make("llama", KINDS["llama"])))


def test_the_copies_of_weights_are_gone_after_a_rollout(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    made: list[weakref.ref] = []
    inner = DecodeStep.__init__

    def noted(self: DecodeStep, model: PreTrainedModel) -> None:
        inner(self, model)
        made.append(weakref.ref(self))

    monkeypatch.setattr(DecodeStep, "__init__", noted)
    policy = make_policy(tiny_model)
    backend = HFBackend(policy, max_batch_size=8)
    backend.sync(policy, 0)
    backend.generate([Request(Prompt(0, "", "", [5, 6]), [key(0)])], Sampling(4), 0)
    assert len(made) == 2  # the check's and the rollout's
    assert all(reference() is None for reference in made)
