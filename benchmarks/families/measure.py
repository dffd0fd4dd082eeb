"""Two training steps of a tiny model of one architecture, and how far its three log-probabilities are from its own.

The sampler's (``rollout.backend: hf``), the update's (packed or padded rows, all together and each alone), and those of
the model in ``final/``, loaded by ``from_pretrained`` into transformers' own classes: a plain forward pass of each row
alone, without anything of this project. All in float32, at the weights after two steps.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from benchmarks.families.architectures import Case, config_of
from data.tiny import build_tokenizer
from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.config import Recipe
from grpo.errors import RunError, UserError
from grpo.model.loading import load_tokenizer
from grpo.model.policy import Policy
from grpo.randomness import key
from grpo.run.run import Run
from grpo.types import Completion, Prompt, TrainedSequence
from grpo.update.step import optimizer_step

PROMPTS, COMPLETION = (4, 23, 11, 4), 24  # tokens: rows of 5 to 47, behind windows of 8 and ropes of 32
LONGEST = max(PROMPTS) + COMPLETION
STEPS, LEARNING_RATE = 2, 1e-2
SPREAD = 3.0  # times transformers' random weights, whose logits hardly tell one row from another
NEAR = 1e-3  # nats, of float32
STOPS = [1, 5, 9, 20, 33]  # so that completions end at all lengths


@dataclass
class Found:
    """Of one architecture, trained whole or with LoRA. Differences are the largest of all tokens, in nats."""

    status: str = "right"  # or wrong, refused, failed
    why: str = ""
    model: str = ""  # its class
    update: str = ""  # what the log says of it
    decoding: str = ""
    sampler: float | None = None
    trained: float | None = None
    beyond: list[int] = field(default_factory=list)  # tokens of the shortest and of the longest row


def measure(case: Case, *, lora: bool) -> Found:
    found = Found()
    with tempfile.TemporaryDirectory() as folder, _log_of("grpo") as lines:
        try:
            found.model = write_model(case, Path(folder) / "model")
            _train_and_compare(Path(folder), lora, found)
            if not max(found.sampler or 0.0, found.trained or 0.0) <= NEAR:
                found.status, found.why = "wrong", f"by {max(found.sampler or 0.0, found.trained or 0.0):.2g} nats"
        except (UserError, RunError) as error:
            found.status, found.why = "refused", str(error)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            found.status, found.why = "failed", f"{type(error).__name__}: {first}"
    for line in lines:
        for part in ("update", "decoding"):
            if line.startswith(f"{part}: ") and "without" not in line and "fails" not in line:
                setattr(found, part, line.removeprefix(f"{part}: "))
    return found


def write_model(case: Case, folder: Path) -> str:
    """A model with random weights, and a tokenizer. Returns its class."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(case, len(tokenizer)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(SPREAD)
            elif name.endswith(".bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(model).__name__


def _train_and_compare(folder: Path, lora: bool, found: Found) -> None:
    policy, run = _policy(folder / "model", lora)
    backend = HFBackend(policy, max_batch_size=64)
    prompts = [[(7 * i + j) % 60 + 35 for j in range(length)] for i, length in enumerate(PROMPTS)]
    requests = [Request(Prompt(i, "", "", ids), [key(i, g) for g in range(3)]) for i, ids in enumerate(prompts)]

    def sampled(version: int) -> list[TrainedSequence]:
        backend.sync(policy, version)
        return _sequences(requests, backend.generate(requests, Sampling(COMPLETION), version))

    for version in range(STEPS):
        if not optimizer_step(run, sampled(version), LEARNING_RATE)["grad_norm"] > 0:
            raise RuntimeError("no gradient")
    sequences = sampled(STEPS)
    policy.save_pretrained(folder / "final")
    plain = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32).eval()
    expected = [_plain(plain, s) for s in sequences]
    found.beyond = [min(map(len, sequences)), max(map(len, sequences))]
    found.sampler = max(_off(torch.tensor(s.sampler_logprobs), e) for s, e in zip(sequences, expected, strict=True))
    found.trained = max(
        _off(logps_T, e)
        for batch, wanted in [(sequences, expected), *(([s], [e]) for s, e in zip(sequences, expected, strict=True))]
        for logps_T, e in zip(_updates(policy, batch), wanted, strict=True)
    )


def _policy(model: Path, lora: bool) -> tuple[Policy, Run]:
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(model), "dtype": "float32", "lora": {"r": 4} if lora else None},
            "data": {"name": "countdown", "max_prompt_length": max(PROMPTS)},
            "rewards": [{"name": "countdown"}],
            "rollout": {"max_completion_length": COMPLETION},
            "training": {"output_dir": "unused"},
        }
    )
    AcceleratorState._reset_state(reset_partial_state=True)  # one process makes several
    policy = Policy(recipe, Accelerator(cpu=True), load_tokenizer(recipe.model), STOPS, False)
    return policy, Run(recipe, policy, Path("unused"))


def _sequences(requests: list[Request], groups: list[list[Completion]]) -> list[TrainedSequence]:
    return [
        TrainedSequence(request.prompt.token_ids, c.token_ids, c.sampler_logprobs, (-1.0) ** g)
        for request, group in zip(requests, groups, strict=True)
        for g, c in enumerate(group)
    ]


@torch.no_grad()
def _plain(model: Any, sequence: TrainedSequence) -> torch.Tensor:
    """The model's own log-probabilities of a completion: one row, token ids alone."""
    ids = [*sequence.prompt_ids, *sequence.completion_ids]
    logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    start, targets = len(sequence.prompt_ids), torch.tensor(sequence.completion_ids)
    return logits_TV[start - 1 : -1].log_softmax(-1).gather(1, targets[:, None])[:, 0]


@torch.no_grad()
def _updates(policy: Policy, batch: list[TrainedSequence]) -> list[torch.Tensor]:
    """The update's log-probabilities of each completion, in training mode, in one micro-batch."""
    policy.model.train()
    logps_BT = policy.logprobs(policy.collate(batch), 1.0)[0]
    return [logps_T[: len(s.completion_ids)] for logps_T, s in zip(logps_BT, batch, strict=True)]


def _off(logps_T: torch.Tensor, expected_T: torch.Tensor) -> float:
    return float((logps_T - expected_T).abs().nan_to_num(nan=float("inf")).max())


@contextmanager
def _log_of(name: str) -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
