"""The recipe's `teacher` section: a model that the trained one learns to agree with (docs/algorithms.md)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from grpo.config.base import LocalPath, NonEmpty, NonNegative, NonNegativeInt, Positive, Problem, Section, refuse

SOURCES = ("name", "url", "column")
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class TeacherConfig(Section):
    name: LocalPath | None = None
    """A teacher in the training process: hub id, a folder, another run's `final/`, or a GGUF file. Its tokenizer must
    be the student's, its architecture and size may be others. Every process holds it whole, frozen. The divergence is
    then exact, over the whole vocabulary."""
    url: NonEmpty | list[NonEmpty] | None = None
    """A teacher on a vLLM server (`http://host:8000`), or on several that hold the same model: `launch/vllm_serve.sh`
    or a plain `vllm serve`. It says its log-probabilities of the student's tokens, or those of its likeliest ones
    (`top_k`)."""
    column: NonEmpty | None = None
    """With `stage: sft`: the column of the rows that holds a teacher's likeliest tokens with their log-probabilities,
    as `grpo teach` writes it."""
    coef: Positive = 1.0
    """Weight of the divergence in the loss. It is a mean over all tokens of the step, in nats, whatever the policy loss
    is divided by."""
    text_coef: NonNegative = 0.0
    """With `stage: sft`: weight of the cross-entropy of the rows' own text beside it. 0 learns from the teacher's
    distributions alone."""
    divergence: Divergence | None = None
    """At each token: KL(teacher, student) (`forward_kl`), KL(student, teacher) (`reverse_kl`), or the generalized
    Jensen-Shannon divergence between them (`jsd`). null is `reverse_kl` with `stage: grpo`, `forward_kl` with `sft`."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """`jsd`: the teacher's share of the mixture. Near 0 it is beta times `forward_kl`, near 1 (1 - beta) times
    `reverse_kl`."""
    whole_sequence: bool = False
    """With `stage: grpo` and `reverse_kl`: let a token answer for the divergence of the tokens after it too, so that
    the gradient is that of the reverse KL of whole completions (MiniLLM), with far more variance. false counts a
    token's own divergence alone, as on-policy distillation mostly does."""
    top_k: NonNegativeInt = 0
    """With `url`: how many of the teacher's likeliest tokens to ask for at each place (a server gives 20 at most unless
    it was started with `--max-logprobs`); the rest of both distributions counts as one token. 0 asks for the sampled
    token alone."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """With `name`: the type that the teacher is held in and computes in; `auto`: bfloat16 where the device has
    instructions for it, or float32."""
    tokenizer: LocalPath | None = None
    """With `name`: tokenizer of the teacher, where it is not its own."""
    revision: str | None = None
    """With `name`: branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """With `name`: run model code that comes with the weights."""
    timeout: Positive = 600.0
    """With `url`: seconds that a server may take to answer, and to come back after it was lost."""

    @model_validator(mode="after")
    def _one_teacher(self) -> TeacherConfig:
        given = [key for key in SOURCES if getattr(self, key)]
        if len(given) != 1:
            text = f"give exactly one of {', '.join(SOURCES)} (given: {', '.join(given) or 'none'})"
            refuse([Problem(SOURCES, text)])
        belongs = {"name": ("dtype", "tokenizer", "revision", "trust_remote_code"), "url": ("top_k", "timeout")}
        problems = [
            Problem((key, given[0]), f"{key} is only used with {source} (the teacher is given by {given[0]})")
            for source, keys in belongs.items()
            for key in keys
            if source != given[0] and getattr(self, key) != type(self).model_fields[key].default
        ]
        for url in self.urls():
            if not re.fullmatch(r"https?://[^/\s]+", url):
                problems.append(Problem(("url",), f"url: {url} is not a server's URL, such as http://127.0.0.1:8000"))
        if len(set(self.urls())) < len(self.urls()):
            problems.append(Problem(("url",), "url names a server twice"))
        if self.divergence != "jsd" and self.jsd_beta != 0.5:
            problems.append(Problem(("jsd_beta", "divergence"), "jsd_beta is only used with divergence: jsd"))
        refuse(problems)
        return self

    def urls(self) -> list[str]:
        """The servers' URLs, without a slash at the end."""
        urls = self.url or []
        return [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]

    @property
    def sampled_alone(self) -> bool:
        """Is nothing known of the teacher but its log-probability of the token that was sampled?"""
        return self.url is not None and self.top_k == 0

    def problems(self, stage: str, *, temperature: float, truncated: bool) -> list[Problem]:
        """What does not fit the rest of a recipe, by the recipe's keys."""
        if stage == "sft":
            return self._problems_of_sft()
        problems = []
        if self.column:
            text = (
                "teacher.column: rows hold what a teacher says of their own text; with stage grpo it must judge what "
                "the student samples: give teacher.name or teacher.url"
            )
            problems.append(Problem(("teacher.column", "stage"), text))
        if self.text_coef:
            problems.append(Problem(("teacher.text_coef", "stage"), "teacher.text_coef is only used with stage: sft"))
        if self.url and temperature != 1:
            text = (
                f"rollout.temperature ({temperature:g}) must be 1.0 with teacher.url: vLLM says a text's "
                "log-probabilities at temperature 1 alone, and student and teacher are compared at the same one. "
                "teacher.name takes any temperature"
            )
            problems.append(Problem(("rollout.temperature", "teacher.url"), text))
        divergence = self.divergence or "reverse_kl"
        if self.sampled_alone and divergence != "reverse_kl":
            text = (
                f"teacher.divergence: {divergence} needs more of the teacher's distribution than the sampled token: "
                "set teacher.top_k, or take teacher.name"
            )
            problems.append(Problem(("teacher.divergence", "teacher.url", "teacher.top_k"), text))
        if self.whole_sequence and divergence != "reverse_kl":
            text = f"teacher.whole_sequence is of the reverse KL; teacher.divergence is {divergence}"
            problems.append(Problem(("teacher.whole_sequence", "teacher.divergence"), text))
        if truncated and (self.sampled_alone or self.whole_sequence):
            what = "teacher.whole_sequence" if self.whole_sequence else "a teacher of the sampled tokens alone (url)"
            text = (
                f"{what} estimates a divergence from tokens of the student's whole distribution, which rollout.top_p, "
                "top_k and min_p cut: set them to 1.0, 0 and null, or take teacher.name or teacher.top_k without "
                "whole_sequence"
            )
            cut = ("rollout.top_p", "rollout.top_k", "rollout.min_p")
            problems.append(Problem((*cut, "teacher.url", "teacher.whole_sequence"), text))
        return problems

    def _problems_of_sft(self) -> list[Problem]:
        problems = []
        if self.whole_sequence:
            text = "teacher.whole_sequence needs the student's own samples: stage grpo"
            problems.append(Problem(("teacher.whole_sequence", "stage"), text))
        if self.sampled_alone:
            text = (
                "teacher.url with stage sft needs teacher.top_k, such as 20: its log-probability of the row's own "
                "token alone says nothing that the text does not"
            )
            problems.append(Problem(("teacher.top_k", "teacher.url", "stage"), text))
        return problems
