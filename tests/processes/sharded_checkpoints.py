"""Script for test_sharded.py: starts, checkpoints and resumes of policies on one to four forked processes.

sharded_checkpoints.py FOLDER prints, as JSON, how the processes of each part ended.
"""

from __future__ import annotations

import copy
import io
import json
import os
import resource
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from data.tiny import write_tiny_model
from grpo import trainer
from grpo.__main__ import main as grpo_main
from grpo.errors import RunError, UserError
from grpo.model import start as start_module
from grpo.model.loading import load_tokenizer
from grpo.model.placing import local, whole
from grpo.model.policy import Policy
from grpo.prompts.task import Task
from grpo.rollout.rollouts import Rollouts
from grpo.run import shards
from grpo.run.agreement import check_weights
from grpo.run.search import find_checkpoint, latest_checkpoint
from grpo.run.session import make_accelerator
from grpo.run.state import Progress, restore_state, save_state
from tests.conftest import make_recipe
from tests.forked import run_forked
from tests.gradient_of_step import sequences
from tests.launching import ROOT

MOVING = {"beta": 0.1, "sync_ref_model": True}
LORA = {"lora": {"r": 4}}


def recipe_of(root: Path, run: str, model: dict[str, Any], algorithm: dict[str, Any]) -> Any:
    training = {"output_dir": str(root / run), "prompts_per_step": 4}
    return make_recipe(root / "model", model=model, algorithm=algorithm, training=training)


def policy_of(recipe: Any) -> Policy:
    return Policy(recipe, make_accelerator(recipe), load_tokenizer(recipe.model), [1], recipe.algorithm.beta > 0)


def make_step(policy: Policy) -> None:
    logps_BT = policy.logprobs(policy.collate(sequences()), 1.0)[0]
    (logps_BT.sum() / 100).backward()
    policy.average_gradients()
    policy.clip_gradients()
    policy.step(1e-2)
    if policy.reference is not None:
        policy.mix_reference(0.5)


def state_of(policy: Policy) -> dict[str, torch.Tensor]:
    """Everything that a run goes on from, whole."""
    from grpo.model.moments import moments, optimized

    found = {f"model.{name}": tensor for name, tensor in policy.trained_state().items()}
    if policy.reference is not None:
        found |= {f"reference.{n}": p.detach() for n, p in policy.reference.causal_lm.named_parameters()}
    found |= moments(optimized(policy.model, policy.optimizer), policy.optimizer)
    return {name: whole(tensor).clone() for name, tensor in found.items()}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


# ---------------------------------------------------------------------------------------------------------------------
# What a process does


def start(root: Path, model: dict[str, Any]) -> None:
    """Weights of the file, exactly; buffers computed, not read; ties kept; each process its part."""
    policy = policy_of(recipe_of(root, "unused", model, {"beta": 0.1, "sync_ref_model": not model}))
    plain = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    expected, buffers = plain.state_dict(), dict(plain.named_buffers())
    state = policy.base_state() if model else policy.full_state()
    assert state.keys() == expected.keys(), state.keys() ^ expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    twin = policy.empty_copy(torch.bfloat16)
    policy.copy_into(twin)
    assert all(torch.equal(t, expected[n].bfloat16()) for n, t in twin.state_dict().items())
    held = [policy.causal_lm, twin] + ([policy.reference.causal_lm] if policy.reference is not None else [])
    for causal_lm in held:
        for name, buffer in causal_lm.named_buffers():
            assert torch.equal(buffer, buffers[name])
            assert buffer.dtype == buffers[name].dtype
        assert causal_lm.get_input_embeddings().weight is causal_lm.get_output_embeddings().weight
    if policy.reference is not None:
        assert all(torch.equal(whole(p), expected[n]) for n, p in policy.reference.causal_lm.named_parameters())
    if policy.sharded:
        for p in (p for causal_lm in held if causal_lm is not twin for p in causal_lm.parameters()):
            assert isinstance(p, DTensor)
            assert local(p).numel() <= p.numel() / policy.accelerator.num_processes + p[0].numel()


def save(root: Path, run: str, model: dict[str, Any], algorithm: dict[str, Any]) -> None:
    """Steps 1 and 2 are saved; what comes after step 2 and after step 3 is noted."""
    recipe = recipe_of(root, run, model, algorithm)
    policy = policy_of(recipe)
    for step in (1, 2):
        make_step(policy)
        save_state(root / run, recipe, policy, Progress(step=step, num_tokens=7))
    at_2 = state_of(policy)
    make_step(policy)
    at_3, full = state_of(policy), {name: t.clone() for name, t in policy.full_state().items()}
    policy.save_pretrained(root / run / "final")
    if policy.accelerator.is_main_process:
        torch.save({"at 2": at_2, "at 3": at_3}, root / run / "noted.pt")
        loaded = AutoModelForCausalLM.from_pretrained(root / run / "final").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in full.items())


def go_on(root: Path, run: str, model: dict[str, Any], algorithm: dict[str, Any], exact: bool) -> None:
    """What was saved is restored to the bit; the next step is that of the run that went on, to the bit or rounding."""
    recipe = recipe_of(root, run, model, algorithm)
    policy = policy_of(recipe)
    noted = torch.load(root / run / "noted.pt", weights_only=True)
    progress = restore_state(find_checkpoint(root / run, True), recipe, policy)
    assert (progress.step, progress.num_tokens) == (2, 7)
    assert differ(state_of(policy), noted["at 2"]) == 0
    make_step(policy)
    off = differ(state_of(policy), noted["at 3"])
    assert off == 0 if exact else off < 1e-3, off


def save_and_die(root: Path) -> None:
    """The second process is killed once its part is half written."""
    recipe = recipe_of(root, "kept", {}, MOVING)
    policy = policy_of(recipe)
    if policy.accelerator.process_index == 1:
        write = os.fsync

        def deadly(descriptor: int) -> None:
            write(descriptor)
            os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = deadly
    save_state(root / "kept", recipe, policy, Progress(step=3))


def save_to_a_full_disk(root: Path) -> None:
    """One process's part can't be written: every process says so, and earlier checkpoints are as they were."""
    recipe = recipe_of(root, "kept", {}, MOVING)
    policy = policy_of(recipe)
    if policy.accelerator.process_index == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(RunError, match="rank 1 could not write its shard"):
        save_state(root / "kept", recipe, policy, Progress(step=3))
    assert sorted(path.name for path in (root / "kept/checkpoints").iterdir()) == ["step_000001", "step_000002"]


def refuse_what_is_damaged(root: Path) -> None:
    checkpoints = root / "kept/checkpoints"
    (shard,) = checkpoints.glob("step_000002/shards/__1_*")
    good = shard.read_bytes()
    shard.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    assert latest_checkpoint(checkpoints) == checkpoints / "step_000001"
    with pytest.raises(UserError, match=r"shards/__1_0.distcp has changed"):
        find_checkpoint(root / "kept", str(checkpoints / "step_000002"))
    shard.write_bytes(good)
    assert latest_checkpoint(checkpoints) == checkpoints / "step_000002"
    reader = shards._Unpickler(io.BytesIO())
    assert reader.find_class("torch", "Size") is torch.Size
    in_torch = "torch.distributed.checkpoint.filesystem"
    for module, name in (("os", "system"), (in_torch, "os.system"), (in_torch, "os"), ("builtins", "eval")):
        with pytest.raises(RunError, match="which is in no checkpoint"):
            reader.find_class(module, name)


def write_as_before(root: Path, run: str) -> None:
    """A checkpoint of a sharded policy as runs used to write it: gathered, the moments by names of weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    from grpo.run.checkpoint import save_checkpoint
    from grpo.run.state import identity

    recipe = recipe_of(root, run, {}, MOVING)
    policy = policy_of(recipe)
    make_step(policy)
    make_step(policy)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments = copy.deepcopy(get_optimizer_state_dict(policy.model, policy.optimizer.optimizer, options=options))
    model = {name: whole(tensor).clone() for name, tensor in policy.trained_state().items()}
    reference = {n: whole(t).clone() for n, t in policy.reference.causal_lm.state_dict().items()}
    at_2 = state_of(policy)
    make_step(policy)
    at_3 = state_of(policy)
    if policy.accelerator.is_main_process:
        save_checkpoint(
            root / run / "checkpoints",
            2,
            tensors={"model": model, "reference": reference},
            states={"optimizer": moments, "progress": asdict(Progress(step=2, num_tokens=7))},
            manifest=identity(recipe, policy),
            keep=2,
        )
        torch.save({"at 2": at_2, "at 3": at_3}, root / run / "noted.pt")
    policy.accelerator.wait_for_everyone()


def train(
    root: Path, run: str, steps: int, resume: bool, save_every: int = 1, back: bool = False, **model: Any
) -> None:
    """A whole run of the trainer; ``back``: one that goes back to its start after the fifth step."""
    trainer.write_report_at_end = lambda folder: None  # takes seconds
    recipe = make_recipe(
        root / "model",
        model=model,
        data={"args": {"question": "compact"}, "train_size": 24, "eval_size": 4 * back, "max_prompt_length": 32},
        rewards=[{"path": f"{ROOT}/tests/rewards_for_tests.py:length_divides_by_eight"}],
        rollout={"num_generations": 4, "max_completion_length": 6},
        algorithm={} if model else MOVING | {"ref_model_sync_steps": 1},
        scoring={"workers": 1},
        optimizer={"learning_rate": 1e-3},
        training={
            "output_dir": str(root / run),
            "prompts_per_step": 4,
            "max_steps": steps,
            "save_every": save_every,
            "replica_check_every": 2,
            "save_best": "eval/accuracy" if back else None,
        },
        health={"cut_off": "rollback"} if back else {},
    )
    trainer.train(recipe, resume)


# ---------------------------------------------------------------------------------------------------------------------
# Processes that drift apart


def drift(root: Path, model: dict[str, Any]) -> None:
    """Replicas are equal before and after a step. One changed bit of a weight or a buffer is noticed, on all, with the
    rank: the last one, which is the second to hold its part. Sharded over all, no weight is held twice."""
    policy = policy_of(recipe_of(root, "unused", model, {} if model else MOVING))
    check_weights(policy, 0)
    make_step(policy)
    check_weights(policy, 1)
    last = policy.accelerator.num_processes - 1
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    others = list(policy.reference.parameters()) if policy.reference is not None else list(policy.model.parameters())
    frozen, buffer = next(p for p in others if not p.requires_grad), next(policy.model.buffers())
    for tensor in (trained[0], frozen, buffer):
        numbers = local(tensor.detach()).view(-1)
        kept = numbers[:1].clone()
        if policy.accelerator.process_index == last:
            bits = numbers[:1].view(torch.int32 if numbers.element_size() == 4 else torch.int16)
            bits ^= 1
        if policy.replicas is None:
            check_weights(policy, 1)
        else:
            with pytest.raises(RunError, match=rf"^rank {last} \(on .*\) no longer holds the weights .* after step 1"):
                check_weights(policy, 1)
        numbers[:1] = kept
        check_weights(policy, 1)


def drift_in_a_run(root: Path, run: str, model: dict[str, Any]) -> None:
    """In a run that saves at its end alone, weights of the second process change in its first step."""
    make = trainer.train_step

    def changing(run: Any, *others: Any) -> None:
        make(run, *others)
        if run.accelerator.process_index == 1 and run.progress.step == 1:
            weight = next(p for p in run.policy.model.parameters() if p.requires_grad)
            weight.data.view(-1)[0] += 1e-3  # as faulty memory does: without torch's knowledge

    trainer.train_step = changing
    with pytest.raises(RunError, match=r"^rank 1 \(on .*\) no longer holds the weights .* after step 2"):
        train(root, run, 4, False, save_every=0, **model)
    assert not (root / run / "checkpoints").exists()


def other_prompts_in_a_run(root: Path, run: str) -> None:
    """The second process reads other rows, in the third step; the first two are saved."""
    prompt, ask = Task.prompt, Rollouts._ask
    step = 0

    def asking(self: Rollouts, at: int, *others: Any) -> None:
        nonlocal step
        step = at
        ask(self, at, *others)

    def changing(self: Task, part: Any, row: int) -> Any:
        found = prompt(self, part, row)
        return replace(found, token_ids=found.token_ids[::-1]) if step == 2 else found

    if os.environ["RANK"] == "1":
        Rollouts._ask, Task.prompt = asking, changing  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"^rank 1 \(on .*\) draws other prompts for step 3 than the other processes"):
        train(root, run, 4, False)
    assert latest_checkpoint(root / run / "checkpoints").name == "step_000002"


# ---------------------------------------------------------------------------------------------------------------------
# The command


def command(root: Path, run: str, *arguments: str) -> None:
    """``grpo train`` of what ``train`` trains."""
    sys.argv = ["grpo", "train", str(root / "run/recipe.yaml"), f"training.output_dir={root / run}", *arguments]
    trainer.write_report_at_end = lambda folder: None
    try:
        grpo_main()
    except SystemExit as ending:
        os._exit(ending.code if isinstance(ending.code, int) else 0)


def command_asked_to_stop(root: Path, run: str) -> None:
    """The second process is asked to stop while weights load."""
    match = start_module.match

    def asked(*arguments: Any) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        match(*arguments)

    start_module.match = asked
    command(root, run)


# ---------------------------------------------------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    """Qwen2 with tied weights, stored in bfloat16, and the tiny model's tokenizer."""
    from transformers import Qwen2Config

    write_tiny_model(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(**sizes, num_key_value_heads=1, tie_word_embeddings=True, vocab_size=511, eos_token_id=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def copy_of(root: Path, name: str) -> str:
    """The run that stopped after two steps, to go on with."""
    shutil.copytree(root / "stopped", root / name)
    return name


def main(root: Path) -> dict[str, list[int]]:
    write_model(root / "model")
    full, lora = ({}, MOVING), (LORA, {})
    return {
        "start of one": run_forked("fsdp2", 1, start, root, {}),
        "start of two replicas": run_forked("ddp", 2, start, root, {}),
        "start of two shards": run_forked("fsdp2", 2, start, root, {}),
        "start of two shards with LoRA": run_forked("fsdp2", 2, start, root, LORA),
        "two shards save": run_forked("fsdp2", 2, save, root, "two", *full),
        "two shards go on as two": run_forked("fsdp2", 2, go_on, root, "two", *full, True),
        "two shards go on as one": run_forked("fsdp2", 1, go_on, root, "two", *full, False),
        "two shards go on as four": run_forked("fsdp2", 4, go_on, root, "two", *full, False),
        "two shards go on as two replicas": run_forked("ddp", 2, go_on, root, "two", *full, False),
        "two nodes of two shards save": run_forked("hsdp", 4, save, root, "nodes", *full),
        "two nodes of two shards go on": run_forked("hsdp", 4, go_on, root, "nodes", *full, True),
        "two nodes of two shards go on as one": run_forked("fsdp2", 1, go_on, root, "nodes", *full, False),
        "one saves": run_forked("ddp", 1, save, root, "one", *full),
        "one goes on as one": run_forked("ddp", 1, go_on, root, "one", *full, True),
        "one goes on as two shards": run_forked("fsdp2", 2, go_on, root, "one", *full, False),
        "two shards with LoRA save": run_forked("fsdp2", 2, save, root, "lora", *lora),
        "two shards with LoRA go on as two": run_forked("fsdp2", 2, go_on, root, "lora", *lora, True),
        "two shards with LoRA go on as one": run_forked("fsdp2", 1, go_on, root, "lora", *lora, False),
        "shards gathered as before": run_forked("fsdp2", 2, write_as_before, root, "before"),
        "shards gathered as before go on as two": run_forked("fsdp2", 2, go_on, root, "before", *full, True),
        "shards gathered as before go on as one": run_forked("fsdp2", 1, go_on, root, "before", *full, False),
        "to be kept": run_forked("fsdp2", 2, save, root, "kept", *full),
        "killed": run_forked("fsdp2", 2, save_and_die, root),
        "killed, goes on": run_forked("fsdp2", 2, go_on, root, "kept", *full, True),
        "full disk": run_forked("fsdp2", 2, save_to_a_full_disk, root),
        "damaged": run_forked("fsdp2", 1, refuse_what_is_damaged, root),
        "run": run_forked("fsdp2", 2, train, root, "run", 3, False),
        "stopped": run_forked("fsdp2", 2, train, root, "stopped", 2, False),
        "stopped, goes on as one": run_forked("ddp", 1, command, root, copy_of(root, "one goes on"), "--resume"),
        "stopped, goes on as two replicas": run_forked("ddp", 2, command, root, copy_of(root, "replicas"), "--resume"),
        "stopped, goes on as four": run_forked("fsdp2", 4, command, root, copy_of(root, "four"), "--resume"),
        "resumed": run_forked("fsdp2", 2, train, root, "stopped", 3, True),
        "one goes back": run_forked("ddp", 1, train, root, "back alone", 7, False, 0, True),
        "two replicas go back": run_forked("ddp", 2, train, root, "back as replicas", 7, False, 0, True),
        "two shards go back": run_forked("fsdp2", 2, train, root, "back", 7, False, 0, True),
        "two shards go back and stop": run_forked("fsdp2", 2, train, root, "back, stopped", 6, False, 0, True),
        "two shards go on from there": run_forked("fsdp2", 2, train, root, "back, stopped", 7, True, 0, True),
        "replicas drift": run_forked("ddp", 2, drift, root, {}),
        "replicas with LoRA drift": run_forked("ddp", 2, drift, root, LORA),
        "four replicas drift": run_forked("ddp", 4, drift, root, {}),
        "nodes drift": run_forked("hsdp", 4, drift, root, {}),
        "shards do not": run_forked("fsdp2", 2, drift, root, {}),
        "a run drifts": run_forked("ddp", 2, drift_in_a_run, root, "drifts", {}),
        "a run with LoRA drifts": run_forked("ddp", 2, drift_in_a_run, root, "drifts with LoRA", LORA),
        "a run draws other prompts": run_forked("ddp", 2, other_prompts_in_a_run, root, "other prompts"),
        "asked to stop at the start": run_forked("ddp", 2, command_asked_to_stop, root, "asked"),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
