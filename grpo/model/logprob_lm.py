"""A causal LM as the update uses it: its output is log-probabilities of completions, not logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grpo.errors import UserError, first_line
from grpo.model.logprobs import Compared, token_statistics
from grpo.model.truncation import Truncation
from grpo.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SHORT, LONG = 8, 80  # tokens of the rows that are compared at start
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layer types without a recurrent state


class LogprobLM(nn.Module):
    """A causal LM whose forward returns log-probabilities of given completion tokens instead of logits.

    Doing this inside one module's forward is what lets DDP, FSDP2 and ZeRO gather and synchronize its weights.
    """

    def __init__(self, causal_lm: PreTrainedModel):
        super().__init__()
        self.causal_lm = causal_lm
        self._no_split_modules = _units(causal_lm)
        self.head_name = self._part_with(causal_lm.get_output_embeddings())
        base = causal_lm.base_model
        own = base is not causal_lm  # else the class's base_model_prefix names no part of it (Llama 4's text model)
        self.body_name = causal_lm.base_model_prefix if own else self._part_with(causal_lm.get_input_embeddings())

    @property
    def config(self) -> Any:
        return self.causal_lm.config

    @property
    def body(self) -> Any:
        """The module that turns tokens into hidden states."""
        return getattr(self.causal_lm, self.body_name) if self.body_name else self.causal_lm

    @property
    def head_module(self) -> Any:
        """The module that turns hidden states into logits; BERT's has layers of its own before the matrix."""
        return getattr(self.causal_lm, self.head_name) if self.head_name else self.causal_lm

    def _part_with(self, module: nn.Module | None) -> str | None:
        """The name of the causal LM's direct part that is or holds ``module``."""
        parts = self.causal_lm.named_children()
        return next((name for name, part in parts if any(m is module for m in part.modules())), None)

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
        logits = self.head_module(hidden)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        if scale := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
            logits = logits * scale
        for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma, Griffin, xLSTM
            if cap := getattr(config, name, None):
                logits = cap * torch.tanh(logits / cap)
        return logits

    def forward(
        self,
        batch: Batch,
        temperature: float,
        entropy_gradient: bool = False,
        truncation: Truncation | None = None,
        teacher: Compared | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities, entropies, what ``truncation`` leaves of each distribution, and the divergence from
        ``teacher``, whose positions are ``batch.places_M`` (``token_statistics``); (B,T), 0 outside the completion
        mask."""
        hidden_RNH = self.hidden_states(batch)
        predicts_M, targets_M = (x.flatten()[batch.places_M] for x in (batch.predicts_BT, batch.completion_ids_BT))
        of_tokens = token_statistics(
            hidden_RNH.flatten(0, 1).index_select(0, predicts_M),
            targets_M,
            self.head,
            vocab_size=self.vocab_size,
            temperature=temperature,
            parameters=self.head_module.parameters(),
            entropy_gradient=entropy_gradient,
            truncation=truncation,
            teacher=teacher,
        )
        B, T = batch.mask_BT.shape
        logps_BT, entropy_BT, log_left_BT, divergence_BT = (
            x_M.new_zeros(B * T).index_copy(0, batch.places_M, x_M).view(B, T) for x_M in of_tokens
        )
        return logps_BT, entropy_BT, log_left_BT, divergence_BT

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """The last hidden states of the batch's tokens, (R,N,H)."""
        rows: dict[str, Any] = {"input_ids": batch.input_ids_RN, "use_cache": False}
        if batch.layout is not None:
            rows |= {"layout": batch.layout, "position_ids": batch.layout.position_ids_1N}
            rows["attention_mask"] = self.no_mask(batch.input_ids_RN.device)
        return self.body(**rows).last_hidden_state

    @torch.no_grad()
    def check(self, beyond: int = 0, longest: int = LONG) -> None:
        """Refuse a model that is not computed as it computes itself, by a few made-up tokens. ``longest``: of the
        recipe's rows. ``beyond``: a row length that passes the model's windows and rope borders.

        Raises:
            UserError: the model is not a causal LM as ``forward`` expects one; its logits are made in a way that
                ``head`` does not know; or those of a token depend on what comes after it, or on how long its row is:
                rows are padded on the right, and tokens drawn one by one.
        """
        name, was_training = type(self.causal_lm).__name__, self.training
        positions = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None) or LONG
        self.eval()
        try:
            expected_1TV, ours_1TV = self._logits(max(SHORT, beyond, min(LONG, longest, positions)))
            _, alone_1SV = self._logits(SHORT, own=False)
        finally:
            self.train(was_training)
        if expected_1TV.isnan().any():
            named = self.causal_lm.named_parameters()
            guilty = next((f"; {at} holds values that are not finite" for at, p in named if not p.isfinite().all()), "")
            raise UserError(f"model.name: the logits of this {name} are nan{guilty}: take weights that are whole")
        if not (ours_1TV.shape == expected_1TV.shape and torch.allclose(ours_1TV, expected_1TV, rtol=1e-4, atol=1e-4)):
            raise UserError(
                f"model.name: {name} turns hidden states into logits in a way that logprob_lm.LogprobLM.head does not "
                "know; add it there, or take another model"
            )
        moved = float((ours_1TV[:, :SHORT] - alone_1SV).abs().max())
        if not moved <= 1e-3 * max(1.0, float(alone_1SV.max() - alone_1SV.min())):
            raise UserError(
                f"model.name: {name} gives a token other logits (by up to {moved:.2g}) when more tokens follow it, so "
                "it can't be trained on what it samples; an encoder must be loaded as a decoder (is_decoder: true in "
                "its config.json), or take another model"
            )

    def _logits(self, tokens: int, own: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own logits (1,tokens,V) of made-up tokens, if ``own``, and those by body and head."""
        device = next(self.causal_lm.parameters()).device
        ids_1T = (torch.arange(tokens, device=device)[None] * 7 + 3) % self.vocab_size
        try:
            ours = self.head(self.body(input_ids=ids_1T, use_cache=False).last_hidden_state).float()
            return self.causal_lm(input_ids=ids_1T, use_cache=False).logits.float() if own else ours, ours
        except Exception as error:  # a model may raise anything where it is not what is expected here
            adapted = ". Or its adapters do not fit (model.lora.target_modules)"
            raise UserError(
                f"model.name: {type(self.causal_lm).__name__} can't be trained: token ids alone must give logits, and "
                f"its body ({type(self.body).__name__}) last_hidden_state, but it fails ({type(error).__name__}: "
                f"{first_line(error)}). Take a text model (a class that ends in ForCausalLM), or "
                f"the text part of this one{adapted if hasattr(self.causal_lm, 'peft_config') else ''}"
            ) from error


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
