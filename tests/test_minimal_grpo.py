"""The first read: ``examples/minimal_grpo.py`` learns, and it computes what the framework computes."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from data import countdown
from grpo.advantages import group_advantages
from grpo.run.run import Run
from grpo.types import TrainedSequence
from grpo.update.step import optimizer_step
from rewards.countdown import countdown_reward
from tests.conftest import make_policy, make_recipe
from tests.launching import ROOT

FILE = ROOT / "examples" / "minimal_grpo.py"
LIMITS = {"min_numbers": 3, "max_numbers": 3, "min_number": 1, "max_number": 9, "min_target": 1, "max_target": 60}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_grpo", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


minimal: Any = load()


def test_it_is_one_short_file_on_torch_and_transformers() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_its_tasks_are_those_of_the_framework_and_none_is_in_both_splits() -> None:
    splits = [{(tuple(sorted(nums)), target) for nums, target in tasks} for tasks in minimal.make_tasks()]
    assert not splits[0] & splits[1]
    for ours, split in zip(splits, ("train", "eval"), strict=True):
        rows = countdown.build(split, None, **LIMITS)  # type: ignore[arg-type]
        assert ours == {(tuple(sorted(row["nums"])), row["target"]) for row in rows.to_list()}
    task = ([6, 3, 9], 27)
    assert minimal.prompt_of(task) == countdown.QUESTIONS["compact"].format(spaced="6 3 9", target=27)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("(6 * 3) + 9", 1.0),
        (" 9 + 3 * 6 ", 1.0),
        ("9 / 3 * 6", 0.0),  # 18
        ("27", 0.0),
        ("9 + 9 + 9", 0.0),
        ("9 * 3 / 6 * 6", 0.0),
        ("9 * 3 ** 6", 0.0),
        ("9 // 3 + 6", 0.0),
        ("-9 + 3 * 6", 0.0),
        ("9 + 3 *", 0.0),
        ("9 / (6 - 6)", 0.0),
        ("09 + 3 * 6", 0.0),
        ("9 (3 6)", 0.0),
        ("(" * 150, 0.0),
        ("__import__('os')", 0.0),
        ("9 + 3 * 6</answer> <answer>1", 0.0),
        ("", 0.0),
    ],
)
def test_its_rule_is_that_of_the_countdown_reward(answer: str, reward: float) -> None:
    completion = f"<think> so </think> <answer>{answer}</answer>"
    assert minimal.reward_of(completion, ([6, 3, 9], 27)) == reward
    assert countdown_reward(["6 3 9 = 27"], [completion], [[6, 3, 9]], [27]) == [reward]


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    """Four groups of four from the tiny model, with rewards of which one group has no two that differ."""
    model = minimal.AutoModelForCausalLM.from_pretrained(minimal.MODEL)
    tokenizer = minimal.AutoTokenizer.from_pretrained(minimal.MODEL)
    tasks = [task for task in minimal.make_tasks()[0][:4] for _ in range(4)]
    prompts_BN = torch.tensor(tokenizer([minimal.prompt_of(task) for task in tasks]).input_ids)
    chances: list[torch.Tensor] = []  # of the tokens drawn, place by place, for the rows that go on

    def multinomial(probs: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
        drawn = multinomial_of_torch(probs, number, generator=generator)
        chances.append(probs.gather(1, drawn)[:, 0])
        return drawn

    multinomial_of_torch = torch.multinomial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        draw = torch.Generator().manual_seed(0)
        tokens_BT, mask_BT = minimal.sample(model, prompts_BN, 64, tokenizer.eos_token_id, draw)
    sampler_logps_BT = torch.zeros(tokens_BT.shape)
    for t, chance in enumerate(chances):
        sampler_logps_BT[mask_BT[:, t] > 0, t] = chance.log()
    rewards_PG = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
    return {
        "model": model,
        "prompts_BN": prompts_BN,
        "tokens_BT": tokens_BT,
        "mask_BT": mask_BT,
        "sampler_logps_BT": sampler_logps_BT,
        "rewards_PG": rewards_PG,
    }


def test_the_mask_ends_with_the_end_token(batch: dict[str, Any]) -> None:
    eos = batch["model"].config.eos_token_id
    for tokens, mask in zip(batch["tokens_BT"].tolist(), batch["mask_BT"].tolist(), strict=True):
        length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        assert mask == [1.0] * length + [0.0] * (len(tokens) - length)
    assert 0 < batch["mask_BT"].mean() < 1


def test_its_advantages_are_the_frameworks(batch: dict[str, Any]) -> None:
    ours = minimal.advantages_of(batch["rewards_PG"])
    assert ours.numpy() == pytest.approx(group_advantages(batch["rewards_PG"].double().numpy()), abs=1e-6)


def test_its_gradient_is_the_trainers(batch: dict[str, Any], tmp_path: Path) -> None:
    """On one and the same batch, all parameters as one vector, to 1e-5."""
    model, advantages_PG = batch["model"], minimal.advantages_of(batch["rewards_PG"])
    model.zero_grad()
    loss = minimal.backward(model, batch["prompts_BN"], batch["tokens_BT"], batch["mask_BT"], advantages_PG)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    sequences = []
    for i, length in enumerate(batch["mask_BT"].sum(1).int().tolist()):
        sequences.append(
            TrainedSequence(
                prompt_ids=batch["prompts_BN"][i].tolist(),
                completion_ids=batch["tokens_BT"][i, :length].tolist(),
                sampler_logprobs=batch["sampler_logps_BT"][i, :length].tolist(),
                advantage=advantages_PG.flatten()[i].item(),
            )
        )
    algorithm = {"loss_type": "dapo", "beta": 0.0}
    recipe = make_recipe(minimal.MODEL, algorithm=algorithm, optimizer={"max_grad_norm": 0.0})
    policy = make_policy(minimal.MODEL, algorithm=algorithm, optimizer={"max_grad_norm": 0.0})
    found: dict[str, torch.Tensor] = {}

    def capture(_: float) -> None:
        found.update({name: p.grad.clone() for name, p in policy.causal_lm.named_parameters() if p.grad is not None})

    policy.step = capture  # type: ignore[method-assign]
    metrics = optimizer_step(Run(recipe, policy, tmp_path), sequences, 1.0)
    assert ours.keys() == found.keys()
    a, b = (torch.cat([grads[name].flatten().double() for name in ours]) for grads in (ours, found))
    assert float((a - b).norm() / a.norm()) < 1e-5
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    # it sampled token by token, with a cache that loses the rows that ended, from the policy that the trainer computes
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
