"""Script for test_same_numbers.py: what several processes compute, each kind of launch in turn.

same_numbers.py MODEL FOLDER

One Python imports everything, then forks the processes of each kind with what ``accelerate launch`` would tell them
(imports are most of what a process of these tests costs). The first process of a kind writes FOLDER/KIND.pt.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from grpo.backends.hf.backend import HFBackend
from grpo.config import Recipe
from grpo.errors import RunError
from grpo.losses import LOSSES
from grpo.model.loading import load_tokenizer
from grpo.model.placing import local, whole
from grpo.model.policy import Policy
from grpo.model.processes import average_gradients
from grpo.model.teacher import load_teacher
from grpo.run.run import Run
from grpo.run.session import make_accelerator
from grpo.run.shards import read_shards, write_shards
from grpo.types import TrainedSequence
from grpo.update.forward import precompute_logprobs
from grpo.update.step import optimizer_step
from tests.forked import run_forked
from tests.gradient_of_step import move, recipe_for, sequences
from tests.launching import ROOT

KINDS = {"ddp": 2, "fsdp2": 2, "hsdp": 4}
BETA = 0.1
LORA = {"r": 4, "lora_alpha": 16}
PLACES = ("embedding forward", "layer forward", "model forward", "model backward", "layer backward")
Gradient = dict[str, torch.Tensor]


def recipe_of(model: str, micro_batch_size: int, **changes: Any) -> Recipe:
    """``changes`` are of ``model``. The size is given, so the reference's is the very first pass of a LoRA policy."""
    recipe = recipe_for(model, "dapo", micro_batch_size, BETA).model_dump()
    recipe["model"] |= changes
    recipe["training"]["micro_batch_tokens"] = 1000
    return Recipe.model_validate(recipe)


def policy_of(recipe: Recipe) -> Policy:
    tokenizer = load_tokenizer(recipe.model)
    policy = Policy(recipe, make_accelerator(recipe), tokenizer, [tokenizer.eos_token_id], True)
    move(policy.reference)
    with torch.no_grad():  # B starts at zero, which would leave A without a gradient
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    return policy


def step_of(recipe: Recipe, policy: Policy, batch: list[TrainedSequence] | None = None) -> tuple[Gradient, Run]:
    """Whole gradients of an optimizer step, by name; the step itself is intercepted."""
    found: Gradient = {}

    def capture(_: float) -> None:
        trained = {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
        found.update({name: whole(grad).clone() for name, grad in trained.items()})
        policy.optimizer.zero_grad(set_to_none=True)

    policy.step = capture  # type: ignore[method-assign]
    run = Run(recipe, policy, Path("unused"))
    optimizer_step(run, batch or sequences(), 1.0)
    return found, run


def of_every_loss(model: str, losses: Iterable[str]) -> dict[str, Gradient]:
    recipe = recipe_of(model, 2)
    policy = policy_of(recipe)
    found = {}
    for loss_type in losses:
        algorithm = recipe.algorithm.model_copy(update={"loss_type": loss_type})
        found[loss_type], _ = step_of(recipe.model_copy(update={"algorithm": algorithm}), policy)
    return found


def of_teacher(model: str) -> dict[str, Any]:
    """The gradient of a step with a teacher, of which every process holds all, and what the teacher holds."""
    values = recipe_of(model, 2).model_dump()
    values["algorithm"]["beta"] = 0.0
    values["teacher"] = {"name": str(ROOT / "data/tiny_base"), "dtype": "float32"}
    recipe = Recipe.model_validate(values)
    policy = policy_of(recipe)
    load_teacher(recipe, policy)
    assert policy.teacher is not None
    gradient, _ = step_of(recipe, policy)
    held = {name: tensor.clone() for name, tensor in policy.teacher.model.causal_lm.state_dict().items()}
    return {"gradient": gradient, "held": gather_object([held])}


def in_bfloat16(model: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Gradients of a step in micro-batches of one sequence and in one micro-batch, what they looked like on the way,
    and the states of the policy."""
    policy = policy_of(recipe_of(model, 1, dtype="bfloat16", **changes))
    dtypes: set[torch.dtype] = set()
    held: list[int] = []
    statistics = policy.statistics

    def watched(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        held.append(sum(local(p.grad).nbytes for p in policy.model.parameters() if p.grad is not None))
        out = statistics(*arguments, **options)
        dtypes.update(x.dtype for x in out)
        return out

    policy.statistics = watched  # type: ignore[method-assign]
    gradient, _ = step_of(recipe_of(model, 1, dtype="bfloat16", **changes), policy)
    found: dict[str, Any] = {"gradient": gradient, "held": gather_object([max(held)])}
    found["at_once"], run = step_of(recipe_of(model, 8, dtype="bfloat16", **changes), policy)
    found["scored"] = [(s.old_logprobs, s.ref_logprobs) for s in precompute_logprobs(run, sequences(), reference=True)]
    found |= {"dtypes": dtypes, "state": policy.full_state()}
    if policy.is_lora:
        found |= {"base": policy.base_state(), "adapter": policy.adapter_state()}
    policy.save_pretrained(folder)
    if policy.sharded:
        found["shards"] = gather_object([through_a_checkpoint(policy, folder / "shards")])
    backend = HFBackend(policy, max_batch_size=4)
    backend.sync(policy, 1)
    with backend._weights():
        if not backend.shares_weights:
            found["synced"] = {name: t.clone() for name, t in backend.model.state_dict().items()}
    return found


def through_a_checkpoint(policy: Policy, folder: Path) -> bool:
    """Whether shards are read back as they were written."""
    state = policy.trained_state()
    files = write_shards(folder, state, policy.accelerator.process_index)
    back = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    read_shards(folder, back, together=True)
    same = all(torch.equal(local(back[name]), local(tensor)) for name, tensor in state.items())
    return same and sum(file.stat().st_size for file in files) > 0


class RunsOut(torch.autograd.Function):
    """Raises in the backward pass, as the allocator does."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("planted in a backward pass")


@contextmanager
def running_out(policy: Policy, place: str, when: Callable[[torch.Tensor], bool]) -> Iterator[None]:
    """Within it, this process runs out of memory in the forward or backward pass of a module, ``when(its output)``."""
    if place == "nowhere":
        yield
        return
    name, _, which = place.partition(" ")
    base = policy.causal_lm.base_model
    module: nn.Module = {"embedding": base.embed_tokens, "layer": base.layers[1], "model": policy.model}[name]

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        first, *others = out if isinstance(out, tuple) else (out,)
        if (which == "backward" and not first.requires_grad) or not when(first):
            return out
        if which == "forward":
            raise torch.OutOfMemoryError(f"planted in the {place}")
        return (RunsOut.apply(first), *others) if others else RunsOut.apply(first)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def averages(rank: int) -> list[float]:
    """Of gradients 0 and 2, and of 3 and none."""
    both, one = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    both.grad, one.grad = torch.tensor([2.0 * rank]), None if rank else torch.tensor([3.0])
    average_gradients([both, one], torch.distributed.group.WORLD)
    return [float(both.grad), float(one.grad)]


def at_the_second_call(mine: bool) -> Callable[[torch.Tensor], bool]:
    calls = count()
    return lambda _: mine and next(calls) == 1


def where_memory_runs_out(model: str, places: Sequence[str], **changes: Any) -> dict[str, Any]:
    """Gradients, sizes and log-probabilities where the last process runs out of memory once, in a second pass, at each
    place; and what is said where no sequence ever fits."""
    recipe = recipe_of(model, 2, **changes)
    policy = policy_of(recipe)
    batch = sequences(groups=4)
    mine = policy.accelerator.is_last_process
    found: dict[str, Any] = {}
    for place in ("nowhere", *places):
        with running_out(policy, place, at_the_second_call(mine)):
            gradient, run = step_of(recipe, policy, batch)
        with running_out(policy, place, at_the_second_call(mine)):
            scored = precompute_logprobs(Run(recipe, policy, Path("unused")), batch, reference=True)
        sizes = gather_object([run.progress.micro_batch_limit])
        found[place] = {"gradient": gradient, "sizes": sizes, "scored": [s.old_logprobs for s in scored]}
    said = "nothing"
    with running_out(policy, "layer forward", lambda hidden: mine and hidden.shape[1] > 2):
        try:
            step_of(recipe, policy, batch)
        except RunError as error:
            said = str(error)
    return found | {"never fits": gather_object([said])}


def everything(model: str, folder: Path, kind: str) -> dict[str, Any]:
    """HSDP's four processes do what differs from FSDP2 alone."""
    found: dict[str, Any] = {
        "losses": of_every_loss(model, LOSSES if kind == "ddp" else ["dapo"]),
        "full": in_bfloat16(model, folder / "full"),
        "out of memory": where_memory_runs_out(model, PLACES[-2:] if kind == "hsdp" else PLACES),
    }
    if kind == "ddp" and torch.distributed.is_initialized():
        found["averages"] = gather_object([averages(torch.distributed.get_rank())])
    if kind != "hsdp":
        found["teacher"] = of_teacher(model)
        found["lora"] = in_bfloat16(model, folder / "lora", lora=LORA)
    if kind == "fsdp2":
        changes = {"lora": LORA, "gradient_checkpointing": True}
        found["out of memory with LoRA"] = where_memory_runs_out(model, PLACES[-2:], **changes)
    return found


def work(model: str, folder: Path, kind: str) -> None:
    try:
        found = everything(model, folder / kind, kind)
    except BaseException:
        traceback.print_exc()
        os.killpg(0, signal.SIGKILL)  # the others would wait
    if os.environ["RANK"] == "0":
        torch.save(found, folder / f"{kind}.pt")
    torch.distributed.barrier()


def main(model: str, folder: str, *kinds: str) -> None:
    os.setpgrp()
    torch.set_num_threads(1)
    gc.freeze()  # what is imported need not be searched for garbage whenever memory runs out
    for kind in kinds or KINDS:
        ends = run_forked(kind, KINDS[kind], work, model, Path(folder), kind)
        assert not any(ends), f"{kind}: {ends}"


if __name__ == "__main__":
    main(*sys.argv[1:])
