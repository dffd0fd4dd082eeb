"""``rollout.backend: auto``: what it is on which machine, in which words, and what the recipe then says."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo import backends
from grpo.backends import check_engine, make_backend, resolve_backend, rest, what_can_be_had
from grpo.backends.vllm import serve
from grpo.config import Recipe, RolloutConfig
from grpo.config.find import find_recipe
from grpo.config.load import load_recipe
from grpo.errors import UserError
from tests.conftest import make_recipe

SERVER = {"vllm_mode": "server", "vllm_server_base_url": "http://a:1"}
RECIPES = Path(find_recipe("smoke_cpu")).parent


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None, *, for_cpus: bool = False) -> None:
    monkeypatch.setattr(serve, "installed_version", lambda: version)
    monkeypatch.setattr(serve, "for_cpus", lambda: for_cpus)


@pytest.mark.parametrize(
    ("device", "version", "for_cpus", "rollout", "backend", "why"),
    [
        ("cpu", "0.33.0", False, {"vllm_python": "x"}, "hf", "training runs on a cpu, and vLLM is for GPUs"),
        ("cuda", None, False, {}, "hf", "vLLM is not installed here (pip install 'vllm>=0.32,<0.34'), nor does"),
        ("cuda", "0.31.2", False, {}, "hf", "vLLM 0.31.2 is installed, and grpo supports vllm>=0.32,<0.34"),
        ("cuda", "0.32.0", True, {}, "hf", "the vLLM that is installed (0.32.0) is its CPU build"),
        ("cuda", "0.33.0", False, {}, "vllm", "vLLM 0.33.0 is installed"),
        ("cuda", None, False, {"vllm_python": "/opt/bin/python"}, "vllm", "rollout.vllm_python is /opt/bin/python"),
        ("cuda", None, False, SERVER, "vllm", "rollout.vllm_server_base_url names a server"),
    ],
)
def test_vllm_is_taken_on_gpus_where_it_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    version: str | None,
    for_cpus: bool,
    rollout: dict[str, Any],
    backend: str,
    why: str,
) -> None:
    installed(monkeypatch, version, for_cpus=for_cpus)
    found, reason = what_can_be_had(RolloutConfig.model_validate({"backend": "auto", **rollout}), device)
    assert found == backend
    assert reason.startswith(why)


def resolve(device: str, **rollout: Any) -> Recipe:
    accelerator: Any = SimpleNamespace(device=torch.device(device), is_main_process=True)
    return resolve_backend(make_recipe(Path("tiny"), rollout=rollout), accelerator)


def test_the_recipe_says_what_auto_was_and_the_log_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch, "0.33.0")
    asked = {"backend": "auto", "vllm_gpu_memory_utilization": 0.5, "temperature": 0.7}
    with caplog.at_level(logging.INFO, "grpo"):
        there = resolve("cuda", **asked)
        here = resolve("cpu", **asked)
    assert (there.rollout.backend, there.rollout.vllm_gpu_memory_utilization) == ("vllm", 0.5)
    assert there.algorithm.importance_sampling_mode == "token_truncate"
    assert (here.rollout.backend, here.rollout.vllm_gpu_memory_utilization) == ("hf", 0.3)
    assert here.algorithm.importance_sampling_mode == "none"
    assert there.rollout.temperature == here.rollout.temperature == 0.7
    assert Recipe.model_validate(here.model_dump()) == here, "it loads again, as a run's own recipe does"
    assert [record.getMessage() for record in caplog.records] == [
        "rollout.backend: auto is vllm here: vLLM 0.33.0 is installed",
        "rollout.backend: auto is hf here: training runs on a cpu, and vLLM is for GPUs (rollout.backend: vllm takes "
        "it all the same)",
    ]


def test_a_backend_that_was_named_is_left_alone() -> None:
    for backend in ("hf", "vllm"):
        assert resolve("cpu", backend=backend).rollout.backend == backend


def test_a_mode_that_was_named_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.33.0")
    recipe = make_recipe(
        Path("tiny"), rollout={"backend": "auto"}, algorithm={"importance_sampling_mode": "sequence_mask"}
    )
    assert recipe.with_backend("vllm").algorithm.importance_sampling_mode == "sequence_mask"


def test_what_hf_cannot_do_is_refused_with_the_reason_why_it_is_hf() -> None:
    with pytest.raises(
        UserError, match=r"^rollout\.backend: auto is hf here: training runs on a cpu.*\. max_staleness above 0 needs "
    ):
        resolve("cpu", backend="auto", max_staleness=1)


def test_auto_is_resolved_before_a_backend_is_made() -> None:
    with pytest.raises(ValueError, match=r"rollout\.backend is auto; resolve_backend comes first"):
        make_backend(make_recipe(Path("tiny"), rollout={"backend": "auto"}), None)  # type: ignore[arg-type]


def test_only_who_can_rest_is_told_to() -> None:
    told: list[str] = []
    rest(SimpleNamespace(rest=lambda: told.append("rested")))  # type: ignore[arg-type]
    rest(SimpleNamespace())  # type: ignore[arg-type]
    assert told == ["rested"]
    assert backends.rest is rest


GPU = sorted(path.stem for path in RECIPES.glob("*.yaml") if "cpu" not in path.stem)


@pytest.mark.parametrize("name", GPU)
def test_recipes_for_gpus_take_vllm_where_they_find_it(name: str) -> None:
    recipe = load_recipe(name)
    if recipe.stage == "grpo":
        assert recipe.rollout.backend == "auto"
        for backend in ("hf", "vllm"):
            assert recipe.with_backend(backend).rollout.backend == backend  # type: ignore[arg-type]


def test_recipes_for_cpus_do_not() -> None:
    for path in RECIPES.glob("*cpu.yaml"):
        assert load_recipe(path).rollout.backend == "hf"


def test_an_engine_that_cannot_be_had_is_told_before_weights_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def told(**rollout: Any) -> str:
        with pytest.raises(UserError) as refusal:
            check_engine(RolloutConfig.model_validate({"backend": "vllm", **rollout}))
        return str(refusal.value)

    installed(monkeypatch, None)
    assert "vllm is not installed here, and rollout.vllm_python does not say where: pip install 'vllm>=" in told()
    installed(monkeypatch, "0.31.2")
    assert "vLLM 0.31.2 is installed here" in told()
    assert "is not installed for " in told(vllm_python=sys.executable)
    assert f"cannot start {tmp_path}/no: No such file" in told(vllm_python=f"{tmp_path}/no")
    installed(monkeypatch, "0.33.0")
    check_engine(RolloutConfig.model_validate({"backend": "vllm"}))
    check_engine(RolloutConfig.model_validate({"backend": "vllm", **SERVER}))
    check_engine(RolloutConfig())
