"""A model that answers questions one by one, in a recipe's template: transformers' ``generate``, in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import GenerationConfig, TextStreamer

from grpo.config import Recipe
from grpo.model.devices import compute_dtype
from grpo.model.loading import load_configs, load_tokenizer, load_weights
from grpo.prompts import templates
from grpo.prompts.checks import stop_token_ids


class _Pieces(TextStreamer):
    """Hands text on as soon as it can't change any more, without its last newline."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.show(text)


class Answerer:
    """A model (a folder or hub id) with the template, stop strings and sampling of a recipe."""

    def __init__(self, recipe: Recipe, name: str, *, temperature: float | None, max_tokens: int | None):
        others = {"name": name, "lora": None, "load_in_4bit": False, "revision": None}
        own = recipe.model.revision if name == recipe.model.name else None
        config = recipe.model.model_copy(update=others | {"revision": own})
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.recipe, self.device = recipe, device
        self.tokenizer = load_tokenizer(config)
        model_config, generation_config = load_configs(config)
        self.stop_ids = stop_token_ids(self.tokenizer, model_config, generation_config)
        self.model = cast(Any, load_weights(config, compute_dtype(config.dtype, device))).to(device).eval()
        self.model.generation_config = GenerationConfig()  # its own top_p and penalties were not those of training
        self.positions = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.temperature = recipe.evaluation.temperature if temperature is None else temperature
        self.max_tokens = max_tokens or recipe.rollout.max_completion_length

    @torch.inference_mode()
    def answer(
        self,
        question: str,
        seed: int,
        show: Callable[[str], None],
        begin: Callable[[str], None] = lambda prefill: None,
    ) -> str:
        """Give the answer in pieces to ``show``, after the prompt's prefill to ``begin``. Returns how it was ended, for
        a person, and nothing where it ended by itself. Raises UserError where the template refuses the question."""
        data, tokenizer = self.recipe.data, self.tokenizer
        try:
            text, prefill = templates.of_question(data, question, tokenizer)
        except ValueError as error:
            return str(error)
        ids = templates.encode(data, text, tokenizer)
        if not ids:
            return "the tokenizer makes no token of this question"
        room = min(self.max_tokens, self.positions - len(ids)) if self.positions else self.max_tokens
        if room < 1:
            return f"the question has {len(ids)} tokens, and the model has {self.positions} positions in all"
        begin(prefill)
        torch.manual_seed(seed)
        samples = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        settings = GenerationConfig(
            **samples,
            top_k=0 if self.temperature else None,
            max_new_tokens=room,
            eos_token_id=self.stop_ids or None,
            pad_token_id=tokenizer.pad_token_id,
            stop_strings=self.recipe.rollout.stop or None,
        )
        tokens = torch.tensor([ids], device=self.device)
        (made,) = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=settings,
            streamer=_Pieces(tokenizer, show),
            tokenizer=tokenizer,
        )
        answer = made[len(ids) :].tolist()
        stop = self.recipe.rollout.stop
        ended = answer and (answer[-1] in self.stop_ids or any(word in tokenizer.decode(answer) for word in stop))
        return "" if ended or len(answer) < room else f"cut off after {room} tokens"
