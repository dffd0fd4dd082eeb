"""Keys and values of a running batch, in buffers that grow by half instead of being copied at every token."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, (B, heads, capacity, head size) of which the first ``length`` are in use."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            capacity = end + max(32, end // 2)
            self.keys, self.values = self._grown(self.keys, capacity), self._grown(self.values, capacity)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, old: torch.Tensor, capacity: int) -> torch.Tensor:
        new = old.new_empty(old.shape[0], old.shape[1], capacity, old.shape[3])
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.keys, self.values = self.keys.index_select(0, indices), self.values.index_select(0, indices)


def make_cache(config: PreTrainedConfig) -> Cache:
    """A cache for a model of this configuration; transformers' own where layers are not plain full attention."""
    config = config.get_text_config(decoder=True)
    layer_types = getattr(config, "layer_types", None) or []
    plain = set(layer_types) <= {"full_attention"} and not getattr(config, "sliding_window", None)
    if not plain:
        return DynamicCache(config=config)
    return Cache(layers=[GrowingLayer() for _ in range(config.num_hidden_layers)])
