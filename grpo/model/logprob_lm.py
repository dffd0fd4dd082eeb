"""A causal LM as the update uses it: its output is log-probabilities of completions, not logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grpo.errors import RunError
from grpo.model.logprobs import token_statistics
from grpo.model.truncation import Truncation
from grpo.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layer types without a recurrent state


class LogprobLM(nn.Module):
    """A causal LM whose forward returns log-probabilities of given completion tokens instead of logits.

    Doing this inside one module's forward is what lets DDP, FSDP2 and ZeRO gather and synchronize its weights.
    """

    def __init__(self, causal_lm: PreTrainedModel):
        super().__init__()
        self.causal_lm = causal_lm
        self._no_split_modules = _units(causal_lm)

    @property
    def config(self) -> Any:
        return self.causal_lm.config

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config(decoder=True).vocab_size

    def no_mask(self, device: torch.device) -> torch.Tensor | None:
        """For attention that needs no mask: given one of four dimensions, transformers makes none. To make one, it
        would look at positions, for which the host waits. None where layers of another kind may multiply by it."""
        config = self.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not (hasattr(config, "num_attention_heads") and kinds <= ATTENTION):
            return None
        return torch.empty((1, 1, 0, 0), dtype=torch.bool, device=device)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, as the model's own forward makes them (scaling and soft-capping included)."""
        config = self.config.get_text_config(decoder=True)
        logits = self.causal_lm.get_output_embeddings()(hidden)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    def forward(
        self,
        batch: Batch,
        temperature: float,
        entropy_gradient: bool = False,
        truncation: Truncation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities, entropies and what ``truncation`` leaves of each distribution (``token_statistics``),
        (B,T), 0 outside the completion mask."""
        hidden_RNH = self.hidden_states(batch)
        predicts_M, targets_M = (x.flatten()[batch.places_M] for x in (batch.predicts_BT, batch.completion_ids_BT))
        of_tokens = token_statistics(
            hidden_RNH.flatten(0, 1).index_select(0, predicts_M),
            targets_M,
            self.head,
            vocab_size=self.vocab_size,
            temperature=temperature,
            parameters=self.causal_lm.get_output_embeddings().parameters(),
            entropy_gradient=entropy_gradient,
            truncation=truncation,
        )
        B, T = batch.mask_BT.shape
        logps_BT, entropy_BT, log_left_BT = (
            x_M.new_zeros(B * T).index_copy(0, batch.places_M, x_M).view(B, T) for x_M in of_tokens
        )
        return logps_BT, entropy_BT, log_left_BT

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """The last hidden states of the batch's tokens, (R,N,H)."""
        rows: dict[str, Any] = {"input_ids": batch.input_ids_RN, "use_cache": False}
        if batch.layout is not None:
            rows |= {"layout": batch.layout, "position_ids": batch.layout.position_ids_1N}
            rows["attention_mask"] = self.no_mask(batch.input_ids_RN.device)
        return self.causal_lm.base_model(**rows).last_hidden_state

    @torch.no_grad()
    def check_head(self) -> None:
        """Refuse a model whose logits ``head`` does not reproduce, by comparing them on a few tokens."""
        was_training = self.training
        self.eval()
        device = next(self.causal_lm.parameters()).device
        ids_BT = torch.arange(4, device=device)[None] % self.vocab_size
        expected = self.causal_lm(input_ids=ids_BT, use_cache=False).logits.float()
        ours = self.head(self.causal_lm.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state).float()
        self.train(was_training)
        if not torch.allclose(ours, expected, rtol=1e-2, atol=1e-2):
            raise RunError(
                f"{type(self.causal_lm).__name__} turns hidden states into logits in a way that "
                "logprob_lm.LogprobLM.head does not know; add it there"
            )


def _units(causal_lm: nn.Module) -> list[str]:
    """Names of the classes of layers that FSDP shards and gathers one by one.

    A class of models may name layers that this one lacks (another kind of vision tower), or none. Then it is the layers
    of its longest list.
    """
    there = {type(module).__name__ for module in causal_lm.modules()}
    if named := sorted(there & set(getattr(causal_lm, "_no_split_modules", None) or [])):
        return named
    lists = [module for module in causal_lm.modules() if isinstance(module, nn.ModuleList) and len(module)]
    longest = max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=[])
    return sorted({type(layer).__name__ for layer in longest})
