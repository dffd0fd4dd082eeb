"""The reference model over a run: none, frozen, moving every n steps, the base of LoRA; and in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grpo.model import policy as policy_module
from grpo.model.policy import Policy
from grpo.run import run as run_module
from tests.conftest import make_recipe
from tests.small_runs import small_run

SAVED = {"save_every": 1, "save_total_limit": 9}


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> list[Policy]:
    """The policies that runs made."""
    made: list[Policy] = []

    def noted(*arguments: Any, **keys: Any) -> Policy:
        made.append(policy_module.Policy(*arguments, **keys))
        return made[-1]

    monkeypatch.setattr(run_module, "Policy", noted)
    return made


def weights(folder: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    tensors = load_file(folder / f"checkpoints/step_{step:06d}/{name}.safetensors")
    return {key.removeprefix("causal_lm."): tensor for key, tensor in tensors.items()}


def test_without_a_penalty_there_is_no_reference(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policies: list[Policy]
) -> None:
    small_run(tiny_model, tmp_path / "run", monkeypatch, steps=1)
    assert policies[0].reference is None


@pytest.mark.slow
def test_a_frozen_reference_stays_what_the_run_began_with_also_when_resumed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policies: list[Policy]
) -> None:
    keys: dict[str, Any] = {"algorithm": {"beta": 0.1}, "training": SAVED}
    small_run(tiny_model, tmp_path / "run", monkeypatch, steps=2, **keys)
    small_run(tiny_model, tmp_path / "run", monkeypatch, steps=3, resume=True, **keys)
    begun = load_file(tiny_model / "model.safetensors")
    for policy in policies:
        assert policy.reference is not None
        for name, tensor in policy.reference.causal_lm.named_parameters():
            assert torch.equal(tensor, begun[name])
    assert not torch.equal(weights(tmp_path / "run", 3)[name], begun[name]), "while the policy has moved"
    assert not list((tmp_path / "run").glob("checkpoints/*/reference*")), "and no checkpoint needs to hold it"


@pytest.mark.slow
def test_a_moving_reference_mixes_in_the_policy_every_n_steps(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policies: list[Policy]
) -> None:
    """ref = alpha policy + (1 - alpha) ref after steps 2 and 4, by the weights that checkpoints hold."""
    algorithm = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
    keys: dict[str, Any] = {"algorithm": algorithm, "training": SAVED}
    small_run(tiny_model, tmp_path / "run", monkeypatch, steps=3, **keys)
    small_run(tiny_model, tmp_path / "run", monkeypatch, steps=5, resume=True, **keys)
    begun = load_file(tiny_model / "model.safetensors")
    for name, expected in begun.items():
        for step in range(1, 6):
            if step % 2 == 0:
                expected = 0.6 * weights(tmp_path / "run", step)[name] + 0.4 * expected
            found = weights(tmp_path / "run", step, "reference")[name]
            torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)
    assert not torch.equal(found, begun[name])


def test_loras_reference_is_its_base_and_does_not_move(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policies: list[Policy]
) -> None:
    small_run(
        tiny_model,
        tmp_path / "run",
        monkeypatch,
        steps=2,
        model={"lora": {"r": 4}},
        algorithm={"beta": 0.1},
    )
    assert policies[0].reference is None, "no second model is held"
    begun = load_file(tiny_model / "model.safetensors")
    base = policies[0].base_state()
    assert all(torch.equal(base[name], tensor) for name, tensor in begun.items())
    assert any(not torch.equal(t, begun[n]) for n, t in policies[0].full_state().items() if n in begun)
    with pytest.raises(ValueError, match=r"algorithm\.sync_ref_model cannot be used with model\.lora"):
        make_recipe(tiny_model, model={"lora": {"r": 4}}, algorithm={"beta": 0.1, "sync_ref_model": True})
