"""Decoding steps of Llama-shaped models on a CPU by one compiled call each (``step_compiled.cpp``).

A small model's step spends as long between torch's kernels as in them. The C++ beside this file is compiled once, at
first use, into the user's cache folder. Decoding goes through transformers (``attention.py``, ``few_row_linear.py``)
where there is no compiler, or where the model is of another family, in another type or has adapters. A line in the log
says why.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from grpo.backends.hf.kv_cache import DecodeCache
from grpo.errors import RunError
from grpo.kernels import native
from grpo.kernels.native import CannotCompile

SOURCE = Path(__file__).with_name("step_compiled.cpp")
FAMILIES = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"})


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names.split()]


def _numbers(names: str) -> list[tuple[str, type]]:
    return [(name, c_int32) for name in names.split()]


class _Layer(Structure):
    _fields_ = _pointers(
        "input_norm qkv qkv_bias q_norm k_norm o post_norm gate_up down "
        "prompt_keys prompt_values sequence_keys sequence_values"
    )


class _Model(Structure):
    _fields_ = [
        *_numbers("layers hidden heads kv_heads head_dim mlp vocabulary"),
        ("eps", c_float),
        ("scale", c_float),
        ("layer", POINTER(_Layer)),
        *_pointers("norm head"),
    ]


class _Step(Structure):
    _fields_ = [
        *_numbers("sequences prompt_tokens sequence_tokens"),
        *_pointers("order written place prompt prompt_length cos sin x qkv scores sums logits h attended mlp"),
    ]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled source. Raises CannotCompile."""
    found = native.library(SOURCE)
    found.scores_of_thread.restype = c_int64
    for pack in (found.pack_float32, found.pack_bfloat16):
        pack.argtypes = [c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p, c_int32]
    return found


def _base(model: PreTrainedModel) -> Any:  # transformers' types know of no layers
    return model.base_model


def _weight_of_head(model: PreTrainedModel) -> Any:
    return model.get_output_embeddings().weight


def why_not(model: PreTrainedModel) -> str | None:
    """Why a model's decoding steps can't be compiled; None where they can."""
    config, linears = model.config, [m for m in model.modules() if isinstance(m, nn.Linear)]
    if next(model.parameters()).device.type != "cpu":
        return "it is for CPUs"
    if type(model).__name__ not in FAMILIES:
        return f"it does not know {type(model).__name__}"
    if {p.dtype for p in model.parameters()} not in ({torch.float32}, {torch.bfloat16}):
        return "it computes in float32 or bfloat16 throughout"
    if any(type(m) is not nn.Linear for m in linears) or hasattr(model, "peft_config"):
        return "the model has adapters"
    if torch.is_autocast_enabled("cpu"):
        return "it computes under autocast"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "the model has a sliding window"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "the model has a sliding window"
    if config.hidden_act not in ("silu", "swish") or getattr(config, "mlp_bias", False):
        return "its MLP is not a plain SwiGLU"
    if _base(model).layers[0].self_attn.o_proj.bias is not None:
        return "its attention has an output bias"
    head_dim = _base(model).layers[0].self_attn.head_dim
    try:
        known = library().knows_heads_of(head_dim)
    except CannotCompile as error:
        return str(error)
    if not known or config.hidden_size % 16 or config.intermediate_size % 16:
        return f"it is not made for heads of {head_dim} and {config.hidden_size} hidden units"
    return None


class DecodeStep:
    """``NextLogits`` of a model. It copies the weights in the order in which it reads them: make one each rollout."""

    def __init__(self, model: PreTrainedModel):
        self.base = _base(model)
        self.library, self.threads = library(), torch.get_num_threads()
        self.width = self.library.vector_floats()
        self.dtype = model.dtype
        config, head = model.config, _weight_of_head(model)
        attention = self.base.layers[0].self_attn
        self.kept: list[torch.Tensor] = []  # C++ holds pointers into them
        self.layers = (_Layer * len(self.base.layers))(*(self._layer(layer) for layer in self.base.layers))
        self.model = _Model(
            layers=len(self.base.layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            mlp=config.intermediate_size,
            vocabulary=len(head),
            eps=config.rms_norm_eps,
            scale=attention.scaling,
            layer=self.layers,
            norm=self._pointer(self.base.norm.weight),
            head=self._packed([head]),
        )
        self.work: dict[str, torch.Tensor] = {}
        self.shape: object = None

    def __call__(self, tokens_B: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        """Logits (B,V) behind one more token of every running sequence. Adds the token to ``cache``."""
        if self.shape is not cache.shape:
            self._point_into(cache)
        B, V = len(tokens_B), self.model.vocabulary
        written_B, prompt_B = np.array(cache.lengths), np.array(cache.prompt_of)
        shared_B = np.zeros_like(prompt_B) if cache.shape.head_tokens else np.array(cache.prompt_lengths)[prompt_B]
        order_B = np.argsort(prompt_B, kind="stable")
        x_BH = self.base.embed_tokens(tokens_B).float()
        positions_1B = torch.from_numpy(shared_B + written_B)[None]
        cos_BD, sin_BD = (t[0].contiguous() for t in self.base.rotary_emb(x_BH, position_ids=positions_1B))
        logits_BV = torch.empty((B, V))
        arrays = {"order": order_B, "written": written_B, "place": np.array(cache.rows)}
        arrays |= {"prompt": prompt_B, "prompt_length": shared_B}
        tensors = {"cos": cos_BD, "sin": sin_BD, "x": x_BH, "logits": logits_BV} | self.work
        step = _Step(
            sequences=B,
            prompt_tokens=cache.shape.prompt_tokens,
            sequence_tokens=cache.shape.sequence_tokens,
            **{name: array.ctypes.data for name, array in arrays.items()},
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        cache.grow()
        in_bfloat16 = self.dtype == torch.bfloat16
        if self.library.decode_step(ctypes.byref(self.model), ctypes.byref(step), in_bfloat16, self.threads):
            raise RunError(f"{SOURCE.name} is not compiled for heads of {self.model.head_dim}")
        return logits_BV

    def _point_into(self, cache: DecodeCache) -> None:
        """Point into the cache's buffers, and make room for a step of as many sequences as it holds."""
        self.shape = cache.shape
        for layer, held in zip(self.layers, (cache.layers[i] for i in range(len(self.layers))), strict=True):
            for name in ("prompt_keys", "prompt_values", "sequence_keys", "sequence_values"):
                setattr(layer, name, getattr(held, name).data_ptr())
        m, sequences = self.model, cache.shape.sequences
        scores = self.library.scores_of_thread(
            ctypes.byref(m),
            ctypes.byref(_Step(prompt_tokens=cache.shape.prompt_tokens, sequence_tokens=cache.shape.sequence_tokens)),
        )
        columns = {"h": self.threads * m.hidden, "attended": m.heads * m.head_dim, "mlp": m.mlp}
        self.work = {name: torch.empty(sequences * n, dtype=self.dtype) for name, n in columns.items()}
        self.work["qkv"] = torch.empty(sequences * (m.heads + 2 * m.kv_heads) * m.head_dim)
        self.work["sums"] = torch.empty(self.threads * sequences * 2 * self.width)
        self.work["scores"] = torch.empty(self.threads * scores)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        biased = qkv[0].bias is not None
        norms = {name: getattr(attention, name, None) for name in ("q_norm", "k_norm")}
        return _Layer(
            input_norm=self._pointer(layer.input_layernorm.weight),
            qkv=self._packed([torch.cat([projection.weight for projection in qkv])]),
            qkv_bias=self._padded(torch.cat([projection.bias for projection in qkv])) if biased else None,
            o=self._packed([attention.o_proj.weight]),
            post_norm=self._pointer(layer.post_attention_layernorm.weight),
            gate_up=self._packed([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=self._packed([mlp.down_proj.weight]),
            **{name: self._pointer(norm.weight) for name, norm in norms.items() if norm is not None},
        )

    def _pointer(self, tensor: torch.Tensor) -> int:
        """To a small tensor's float32 numbers."""
        self.kept.append(tensor.detach().float().contiguous())
        return self.kept[-1].data_ptr()

    def _padded(self, bias_N: torch.Tensor) -> int:
        return self._pointer(nn.functional.pad(bias_N.detach(), (0, -len(bias_N) % (2 * self.width))))

    def _packed(self, weights: list[torch.Tensor]) -> int:
        """A weight (N,K) in panels, each as wide as two vectors. Of two weights, a panel has one vector of each."""
        pack = self.library.pack_bfloat16 if self.dtype == torch.bfloat16 else self.library.pack_float32
        width, (N, K) = 2 * self.width // len(weights), weights[0].shape
        panels = torch.zeros((-(-N // width), K, 2 * self.width), dtype=self.dtype)
        for i, weight in enumerate(weights):
            source = weight.detach().contiguous()
            pack(source.data_ptr(), N, K, width, i * width, panels.data_ptr(), self.threads)
        self.kept.append(panels)
        return panels.data_ptr()
