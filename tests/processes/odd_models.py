"""Script for test_odd_models.py: models that are more than one stack of like layers, on one and two forked processes.

odd_models.py FOLDER prints, as JSON, how the processes of each part ended.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM

from data.tiny import write_tiny_model
from grpo.backends.hf.backend import HFBackend
from grpo.errors import RunError
from grpo.model.loading import load_tokenizer
from grpo.model.placing import whole
from grpo.model.policy import Policy
from grpo.run.run import Run
from grpo.run.session import make_accelerator
from grpo.update.step import optimizer_step
from tests.conftest import make_recipe
from tests.forked import run_forked
from tests.gradient_of_step import sequences
from tests.small_models import IMAGES, LATENT, SMALL, VISION

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4, "n_routed_experts": 4}
GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
CONFIGS = {
    "experts": AutoConfig.for_model("qwen3_moe", **SMALL | EXPERTS),
    "images": AutoConfig.for_model(
        "gemma3", text_config=SMALL | {"sliding_window": 8}, vision_config=VISION, tie_word_embeddings=True, **IMAGES
    ),
    "router bias": AutoConfig.for_model("deepseek_v3", **SMALL | EXPERTS | GROUPS | LATENT),
}
LORA = {"lora": {"r": 4}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts with LoRA": ("experts", LORA),
    "images": ("images", {}),
    "images with LoRA": ("images", LORA),
    "router bias": ("router bias", {}),
    "router bias with LoRA": ("router bias", LORA),
}


def write_model(folder: Path, config: Any) -> None:
    write_tiny_model(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    model.save_pretrained(folder)


def policy_of(root: Path, name: str, dtype: str, model: dict[str, Any]) -> Policy:
    recipe = make_recipe(root / name, model=model | {"dtype": dtype})
    return Policy(recipe, make_accelerator(recipe), load_tokenizer(recipe.model), [1], not model)


def train(root: Path, case: str, out: str) -> None:
    """Two steps in float32. The state goes to OUT/CASE.pt, the model to OUT/CASE."""
    name, changes = CASES[case]
    policy = policy_of(root, name, "float32", changes)
    backend = HFBackend(policy, max_batch_size=4)
    before = {n: whole(p.detach()).clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    for step in (1, 2):
        # Half of the processes see other texts, which go past some experts.
        mine = sequences()[policy.accelerator.process_index % 2 :: policy.accelerator.num_processes]
        logps_BT = policy.logprobs(policy.collate(mine), 1.0)[0]
        (logps_BT.sum() * policy.accelerator.num_processes / 100).backward()
        policy.average_gradients()
        assert policy.clip_gradients() > 0
        policy.step(1e-2)
        backend.sync(policy, step)
    assert all(torch.equal(whole(policy.model.get_parameter(n).detach()), t) for n, t in before.items())
    state = {n: t.clone() for n, t in policy.full_state().items()}
    policy.save_pretrained(root / out / case)
    if policy.sharded:
        layers = [m for m in policy.model.modules() if type(m).__name__.endswith("DecoderLayer")]
        assert layers
        assert all(isinstance(layer, FSDPModule) for layer in layers), "each is gathered by itself"
        with backend._weights():
            held = backend.model.state_dict()
            assert all(torch.equal(held[n], t) for n, t in state.items()), (
                "adapters are merged in the copy that samples"
            )
    if policy.accelerator.is_main_process:
        torch.save(state, root / out / f"{case}.pt")
    policy.accelerator.wait_for_everyone()


def balances(root: Path, out: str) -> None:
    """A step whose experts' loads are those of all processes: the same metrics and biases on every one."""
    algorithm = {"router_bias_update_rate": 0.01, "router_aux_loss_coef": 0.1}
    recipe = make_recipe(root / "router bias", model={"dtype": "float32"}, algorithm=algorithm)
    policy = Policy(recipe, make_accelerator(recipe), load_tokenizer(recipe.model), [1], False)
    assert policy.routing is not None
    metrics = optimizer_step(Run(recipe, policy, root / out), sequences(), 1e-3)
    biases = [bias.clone() for bias in policy.routing.biases.values()]
    torch.save((metrics, biases), root / out / f"balance {policy.accelerator.process_index}.pt")
    policy.accelerator.wait_for_everyone()


def keeps_its_types(root: Path) -> None:
    """In bfloat16 a router's bias stays what it is: in copies that sample, in the reference and in final/."""
    policy = policy_of(root, "router bias", "bfloat16", {})
    names = [name for name in policy.full_state() if name.endswith("e_score_correction_bias")]
    assert names
    policy.save_pretrained(root / "types")
    twin = policy.empty_copy(torch.bfloat16)
    policy.copy_into(twin)
    states = [policy.reference.causal_lm.state_dict(), twin.state_dict(), dict(policy.state_stream(torch.bfloat16))]
    if policy.accelerator.is_main_process:
        states.append(AutoModelForCausalLM.from_pretrained(root / "types").state_dict())
    expected = AutoModelForCausalLM.from_pretrained(root / "router bias", dtype=torch.float32).state_dict()
    for state in states:
        assert all(torch.equal(state[name], expected[name]) for name in names)
        assert state["lm_head.weight"].dtype == torch.bfloat16
    policy.accelerator.wait_for_everyone()


def meets_a_full_disk(root: Path) -> None:
    """The first process can't write final/: all say so, and a folder of before is as it was."""
    policy = policy_of(root, "experts", "float32", LORA)
    final = root / "refused"
    policy.save_pretrained(final)
    before = {path: path.read_bytes() for path in final.rglob("*") if path.is_file()}
    if policy.accelerator.is_main_process:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(RunError, match=r"could not write .*refused.*give --resume"):
        policy.save_pretrained(final)
    assert {path: path.read_bytes() for path in final.rglob("*") if path.is_file()} == before
    assert not list(root.glob("refused.*"))


def main(root: Path) -> dict[str, list[int]]:
    for name, config in CONFIGS.items():
        write_model(root / name, config)
    ended = {}
    for kind, processes in (("ddp", 1), ("ddp", 2), ("fsdp2", 2)):
        out = f"{kind} {processes}"
        (root / out).mkdir()
        for case in CASES:
            ended[f"{out} {case}"] = run_forked(kind, processes, train, root, case, out)
        ended[f"{out} balance"] = run_forked(kind, processes, balances, root, out)
        ended[f"{out} types"] = run_forked(kind, processes, keeps_its_types, root)
    ended["a full disk"] = run_forked("fsdp2", 2, meets_a_full_disk, root)
    return ended


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
