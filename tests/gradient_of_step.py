"""Script for test_update.py: the gradient of one optimizer step, for every loss type, under whatever launch it is run.

    [accelerate launch ...] gradient_of_step.py MODEL OUT.pt MICRO_BATCH_SIZE BETA
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from grpo.config import Recipe
from grpo.loading import load_tokenizer
from grpo.losses import LOSSES
from grpo.policy import Policy
#from grpo.session import allow_fsdp_on_cpu
from grpo.types import Sequence
from grpo.update import optimizer_step


def sequences(groups: int = 4, size: int = 4) -> list[Sequence]:
    """Groups of unequal length, one of them without signal, one sequence masked."""
    draw = random.Random(0)
    made = []
    for group in range(groups):
        prompt = [draw.randrange(10, 300) for _ in range(draw.randrange(3, 12))]
        for g in range(size):
            completion = [draw.randrange(10, 300) for _ in range(draw.randrange(1, 40))]
            logps = [draw.uniform(-8, -4) for _ in completion]
            made.append(
                Sequence(
                    prompt_ids=prompt,
                    completion_ids=completion,
                    sampler_logprobs=logps,
                    advantage=0.0 if group == 1 else draw.gauss(0, 1),
                    valid=(group, g) != (2, 1),
                    old_logprobs=logps,
                )
            )
    return made


def main(model: str, out: str, micro_batch_size: str, beta: str) -> None:
    accelerator = Accelerator(cpu=True)
    import os; from accelerate import PartialState; from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    if os.environ.get("ACCELERATE_USE_FSDP"): PartialState().distributed_type = DistributedType.FSDP; accelerator.state.distributed_type = DistributedType.FSDP; accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    gradients = {}
    for loss_type in LOSSES:
        recipe = Recipe.model_validate(
            {
                "model": {"name": model, "dtype": "float32"},
                "data": {"name": "countdown"},
                "rewards": [{"name": "countdown"}],
                "algorithm": {"loss_type": loss_type, "beta": float(beta), "epsilon": 5.0},
                "optimizer": {"max_grad_norm": 0.0},
                "training": {"output_dir": "unused", "micro_batch_size": int(micro_batch_size)},
            }
        )
        tokenizer = load_tokenizer(recipe.model)
        policy = Policy(recipe, accelerator, tokenizer, [tokenizer.eos_token_id], needs_reference=float(beta) > 0)
        if policy.reference is not None:  # a reference that differs, or the KL has no gradient
            with torch.no_grad():
                for i, parameter in enumerate(policy.reference.parameters()):
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        found: dict[str, torch.Tensor] = {}

        def capture(learning_rate: float, policy: Policy = policy, found: dict[str, torch.Tensor] = found) -> None:
            for name, parameter in accelerator.unwrap_model(policy.model).named_parameters():
                gradient = parameter.grad
                found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
            policy.optimizer.zero_grad()

        policy.step = capture  # type: ignore[method-assign]
        optimizer_step(
            policy,
            sequences(),
            recipe.algorithm,
            recipe.training,
            temperature=0.9,
            learning_rate=1.0,
            max_completion_length=40,
            dump_to=Path(out).parent,
        )
        gradients[loss_type] = found
    if accelerator.is_main_process:
        torch.save({"gradients": gradients, "sharded": policy.sharded, "processes": accelerator.num_processes}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
