"""The gradient of one optimizer step on made-up sequences, of one process."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from grpo.config import Recipe
from grpo.model.loading import load_tokenizer
from grpo.model.logprob_lm import LogprobLM
from grpo.model.placing import sharded_like
from grpo.model.policy import Policy
from grpo.run.run import Run
from grpo.run.session import make_accelerator
from grpo.types import TrainedSequence
from grpo.update.step import optimizer_step

TEMPERATURE = 0.9


def sequences(groups: int = 2, size: int = 4) -> list[TrainedSequence]:
    """Eight completions of unequal length in two groups; two are without signal, one is masked."""
    draw = random.Random(0)
    made = []
    for group in range(groups):
        prompt = [draw.randrange(10, 300) for _ in range(draw.randrange(3, 12))]
        for g in range(size):
            completion = [draw.randrange(10, 300) for _ in range(draw.randrange(1, 40))]
            logps = [draw.uniform(-8, -4) for _ in completion]
            advantage = 0.0 if (group, g) in ((1, 0), (1, 3)) else draw.gauss(0, 1)
            valid = (group, g) != (0, 1)
            made.append(TrainedSequence(prompt, completion, logps, advantage, valid, old_logprobs=logps))
    return made


def recipe_for(model: str, loss_type: str, micro_batch_size: int, beta: float) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": model, "dtype": "float32"},
            "data": {"name": "countdown"},
            "rewards": [{"name": "countdown"}],
            "rollout": {"temperature": TEMPERATURE, "max_completion_length": 40},
            "algorithm": {"loss_type": loss_type, "beta": beta, "epsilon": 5.0},
            "optimizer": {"max_grad_norm": 0.0},
            "training": {"output_dir": "unused", "micro_batch_size": micro_batch_size},
        }
    )


def gradient(recipe: Recipe, out: Path) -> tuple[dict[str, torch.Tensor], Policy]:
    """Whole gradients by parameter name of one step on ``sequences()``; the step itself is intercepted."""
    accelerator = make_accelerator(recipe)
    tokenizer = load_tokenizer(recipe.model)
    policy = Policy(recipe, accelerator, tokenizer, [tokenizer.eos_token_id], recipe.algorithm.beta > 0)
    move(policy.reference)
    found: dict[str, torch.Tensor] = {}

    def capture(_: float) -> None:
        for name, parameter in accelerator.unwrap_model(policy.model).named_parameters():
            found[name] = parameter.grad.clone()

    policy.step = capture  # type: ignore[method-assign]
    optimizer_step(Run(recipe, policy, out.parent), sequences(), 1.0)
    return found, policy


@torch.no_grad()
def move(reference: LogprobLM | None) -> None:
    """Make it differ from the policy, or the KL has no gradient."""
    for i, parameter in enumerate(reference.parameters() if reference is not None else ()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.add_(sharded_like(0.02 * noise.to(parameter.dtype), parameter))
