"""A teacher in the training process: a frozen model of any size and architecture that reads the student's tokens.

It is whole on every process, in a type of its own. So a pass through it makes no collectives, under FSDP2 either, and
its head is at hand in the student's forward and backward pass. There, ``model.logprobs`` compares the two distributions
chunk by chunk; the teacher's logits are never held whole. What is known of a teacher elsewhere, its likeliest tokens,
is compared in the same way.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch.nn.functional import pad

from grpo import kernels
from grpo.config import ModelConfig, Recipe, TeacherConfig
from grpo.errors import UserError
from grpo.losses import completed, divergence_of, divergence_slope
from grpo.model.borders import check_rope, past_borders
from grpo.model.devices import compute_dtype, logit_sizes
from grpo.model.first_process import on_main
from grpo.model.loading import load_configs, load_tokenizer, load_weights
from grpo.model.logprob_lm import LogprobLM
from grpo.model.logprobs import Compared
from grpo.model.packed_check import all_cores, in_float32, why_padded
from grpo.model.placing import fill, match, materialize, shell
from grpo.model.same_tokenizer import check_same_tokenizer
from grpo.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grpo.model.policy import Policy

log = logging.getLogger("grpo")


class Teacher:
    """A frozen causal LM, on this process's device. ``packed`` says whether it computes packed rows."""

    def __init__(self, logprob_lm: LogprobLM, dtype: torch.dtype, device: torch.device, *, packed: bool):
        self.model = logprob_lm.eval().requires_grad_(False)
        self.dtype, self.device = dtype, device
        self.packed = packed

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @torch.no_grad()
    def compared(self, batch: Batch, temperature: float, config: TeacherConfig) -> Compared:
        """Its distributions of the batch's tokens, at this temperature, to be compared with."""
        return _FromHead(config, self, self._hidden(batch), temperature)

    @torch.no_grad()
    def likeliest(self, batch: Batch, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Its k likeliest tokens at each of the batch's completion tokens, the likeliest first, and their
        log-probabilities at temperature 1; (M,k)."""
        hidden_MH = self._hidden(batch)
        rows = max(1, logit_sizes(self.device).chunk // self.vocab_size)
        found = [self.logits(hidden_nH).log_softmax(1).topk(k) for hidden_nH in hidden_MH.split(rows)]
        return torch.cat([top.indices for top in found]), torch.cat([top.values for top in found])

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """The hidden states that predict the tokens at ``batch.places_M``, (M,H)."""
        with self._autocast():
            hidden_RNH = self.model.hidden_states(batch)
        predicts_M = batch.predicts_BT.flatten()[batch.places_M]
        return hidden_RNH.flatten(0, 1).index_select(0, predicts_M)

    @torch.no_grad()
    def logits(self, hidden_rH: torch.Tensor) -> torch.Tensor:
        """Its logits of hidden states, float32."""
        with self._autocast():  # the student may compute in another type
            return self.model.head(hidden_rH).float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


@dataclass(frozen=True)
class _Rows:
    """What both kinds of ``Compared`` have in common: the divergence of two rows of log-probabilities."""

    config: TeacherConfig

    def rows(self, logps_rV: torch.Tensor, at: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's and the teacher's log-probabilities over the tokens that both have."""
        raise NotImplementedError

    def divergence(self, logps_rV: torch.Tensor, at: slice) -> torch.Tensor:
        kind, beta = self._kind()
        return divergence_of(*self.rows(logps_rV, at), kind=kind, beta=beta)

    def slope(self, logps_rV: torch.Tensor, at: slice) -> torch.Tensor:
        kind, beta = self._kind()
        slope_rS = divergence_slope(*self.rows(logps_rV, at), kind=kind, beta=beta)
        return pad(slope_rS, (0, logps_rV.shape[1] - slope_rS.shape[1]))

    def _kind(self) -> tuple[str, float]:
        assert self.config.divergence is not None, "Recipe fills it in"
        return self.config.divergence, self.config.jsd_beta


@dataclass(frozen=True)
class _FromHead(_Rows):
    """Of a teacher in the process: the whole distribution, from its last hidden states.

    Embeddings of one family may be padded to different sizes. Compared are the tokens that both models have; what one
    of them gives to others, which no text holds, is left out of its distribution (renormalized).
    """

    teacher: Teacher
    hidden_MH: torch.Tensor
    temperature: float

    def rows(self, logps_rV: torch.Tensor, at: slice) -> tuple[torch.Tensor, torch.Tensor]:
        shared = min(logps_rV.shape[1], self.teacher.vocab_size)
        logits_rS = self.teacher.logits(self.hidden_MH[at])[:, :shared]
        student_rS = logps_rV if shared == logps_rV.shape[1] else logps_rV[:, :shared].log_softmax(1)
        return student_rS, (logits_rS / self.temperature).log_softmax(1)


@dataclass(frozen=True)
class _FromTop(_Rows):
    """Of a teacher elsewhere: its likeliest tokens, the rest as one (``losses.completed``)."""

    ids_MK: torch.Tensor
    logps_MK: torch.Tensor

    def rows(self, logps_rV: torch.Tensor, at: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return logps_rV, completed(logps_rV, self.ids_MK[at], self.logps_MK[at])


def compared_with(policy: Policy, batch: Batch, temperature: float, config: TeacherConfig | None) -> Compared | None:
    """What the batch's tokens are compared with over the vocabulary; None without a teacher, or where it says nothing
    but the sampled tokens' log-probabilities."""
    if config is None or config.sampled_alone:
        return None
    if policy.teacher is not None:
        return policy.teacher.compared(batch, temperature, config)
    assert batch.teacher_ids_BTK is not None, "of a server, or of the rows"
    assert batch.teacher_top_BTK is not None
    ids_MK, logps_MK = (x.flatten(0, 1)[batch.places_M] for x in (batch.teacher_ids_BTK, batch.teacher_top_BTK))
    return _FromTop(config, ids_MK, logps_MK)


def load_teacher(recipe: Recipe, policy: Policy) -> None:
    """Give the policy the teacher that ``teacher.name`` names, if there is one. Called by all processes. If it can't
    compute packed rows, the policy's are padded too. Raises UserError as ``read_teacher`` does."""
    if recipe.teacher is None or recipe.teacher.name is None:
        return
    policy.teacher = read_teacher(recipe, policy.accelerator)
    if policy.packed and not policy.teacher.packed and policy.accelerator.is_main_process:
        log.info("update: padded rows, which are slower, because the teacher can't compute packed ones")
    policy.packed = policy.packed and policy.teacher.packed


def read_teacher(recipe: Recipe, accelerator: Accelerator) -> Teacher:
    """The teacher that ``teacher.name`` names, on every process: the first reads it and sends it to the others.

    Raises:
        UserError: it can't be loaded, or can't compute the recipe's rows.
    """
    assert recipe.teacher is not None
    model, device = model_of(recipe.teacher), accelerator.device
    dtype = compute_dtype(recipe.teacher.dtype, device)
    read: list[PreTrainedModel] = []

    def read_and_check() -> str | None:
        with _as_teacher():
            read.append(load_weights(model, dtype))
            return _check(read[0], recipe, device, dtype)

    why = on_main(accelerator, read_and_check)
    if accelerator.num_processes == 1:
        causal_lm = read.pop().to(device)
    else:
        causal_lm = _sent(model, dtype, read.pop() if read else None, recipe, device)
    gc.collect()
    if accelerator.is_main_process:
        size, kind = sum(p.numel() for p in causal_lm.parameters()), str(dtype).removeprefix("torch.")
        log.info(
            "teacher: %s, %.3g parameters in %s%s", model.name, size, kind, f"; it can't pack: {why}" if why else ""
        )
    return Teacher(LogprobLM(causal_lm), dtype, device, packed=why is None)


def check_teacher(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Look at ``teacher.name``, if there is one, before any weights load. Raises UserError where it can't be read, or
    can't judge the student's tokens."""
    if recipe.teacher is None or recipe.teacher.name is None:
        return
    model = model_of(recipe.teacher)
    with _as_teacher():
        check_same_tokenizer(tokenizer, load_tokenizer(model), str(recipe.teacher.name))
        text = load_configs(model)[0].get_text_config(decoder=True)
    if text.vocab_size < len(tokenizer):
        raise UserError(
            f"teacher.name: {recipe.teacher.name} has embeddings of {text.vocab_size} tokens, its tokenizer "
            f"{len(tokenizer)}: tokenizer and model don't belong together"
        )
    positions, longest = getattr(text, "max_position_embeddings", None), recipe.longest_sequence()
    if positions and longest > positions:
        raise UserError(
            f"teacher.name: {recipe.teacher.name} has {positions} positions, and prompt and completion may have "
            f"{longest} tokens together: lower data.max_prompt_length or rollout.max_completion_length"
        )


def model_of(config: TeacherConfig) -> ModelConfig:
    """The teacher as the loaders of models know one."""
    assert config.name is not None
    return ModelConfig(
        name=config.name,
        dtype=config.dtype,
        tokenizer=config.tokenizer,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def _check(causal_lm: PreTrainedModel, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if it can compute packed rows, else why it can't. Raises UserError where it can't be used at all."""
    logprob_lm, longest = LogprobLM(causal_lm.eval()), recipe.longest_sequence()
    cannot_pack = _install(causal_lm, recipe, device)
    check_rope(causal_lm, longest)
    with in_float32(logprob_lm), all_cores(device):
        logprob_lm.check(past_borders(logprob_lm.config, longest), longest)
    return cannot_pack or why_padded(logprob_lm, device, dtype, longest)


def _install(causal_lm: PreTrainedModel, recipe: Recipe, device: torch.device) -> str | None:
    return kernels.install(causal_lm, device, trains=False, alone=True, wanted=recipe.model.kernels)


def _sent(
    model: ModelConfig, dtype: torch.dtype, read: PreTrainedModel | None, recipe: Recipe, device: torch.device
) -> PreTrainedModel:
    """The first process's model, on every process, whole."""
    causal_lm = shell(load_configs(model)[0], dtype, model.trust_remote_code)
    _install(causal_lm, recipe, device)
    source = None if read is None else LogprobLM(read)
    match(LogprobLM(causal_lm), source, dtype)
    materialize(causal_lm, device)
    fill(LogprobLM(causal_lm), source, several=True)
    return causal_lm


@contextmanager
def _as_teacher() -> Iterator[None]:
    """Within it, what is wrong with a model is said of the teacher: messages of loaders begin with ``model.``."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith("model."):
            raise
        raise UserError(f"teacher.{str(error).removeprefix('model.')}") from error
