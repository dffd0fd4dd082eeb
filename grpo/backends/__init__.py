"""Rollout backends: one file or folder each, chosen by ``rollout.backend``; ``own`` holds what loads one of the user's.

Others take ``make_backend`` and, before anything heavy is loaded, ``find_backend``, ``resolve_backend`` and
``check_engine``; ``rest`` after a step's rollouts; ``find_servers`` where a teacher is on servers; from ``base`` the
protocol, and what a backend is asked for.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, Protocol

from grpo.errors import UserError
from grpo.user_code import is_place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from grpo.backends.base import Backend
    from grpo.config import Recipe, RolloutConfig
    from grpo.model.policy import Policy
    from grpo.types import TeacherSays

log = logging.getLogger("grpo")


class TeacherServers(Protocol):
    """A teacher elsewhere (``vllm.teacher``)."""

    def ask(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[TeacherSays]:
        """What it says of each completion (prompt and completion as token ids)."""
        ...


def find_servers(recipe: Recipe, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> TeacherServers | None:
    """The servers of ``teacher.url``, looked at by the first process; None without. Raises UserError where they do not
    answer, or can't judge the student's tokens."""
    if recipe.teacher is None or recipe.teacher.url is None:
        return None
    from grpo.backends.vllm.teacher import TeacherServers as OnVllm
    from grpo.run.session import on_main

    servers = OnVllm(recipe.teacher)
    on_main(accelerator, lambda: servers.check(tokenizer, recipe.longest_sequence()))
    return servers


def find_backend(recipe: Recipe) -> None:
    """Raise UserError where ``rollout.backend`` names a backend of the user's own that cannot be one."""
    if is_place(recipe.rollout.backend):
        from grpo.backends.own import load_backend

        load_backend(recipe)


def check_engine(rollout: RolloutConfig) -> None:
    """Raise UserError where ``backend: vllm`` is to start an engine and its Python has no vLLM that will do."""
    if rollout.backend != "vllm" or rollout.vllm_mode != "colocate":
        return
    from grpo.backends.vllm import serve

    python, version = rollout.vllm_python, serve.installed_version()
    if python is not None:
        try:
            version = serve.version_for(python)
        except OSError as error:
            raise UserError(f"rollout.vllm_python: cannot start {python}: {error.strerror}") from None
    where = f"for {python} (rollout.vllm_python)" if python else "here, and rollout.vllm_python does not say where"
    if version is None:
        raise UserError(f"rollout.backend: vllm is not installed {where}: pip install 'vllm{serve.RANGE}'")
    if not serve.supported(version):
        raise UserError(f"rollout.backend: vLLM {version} is installed {where}; grpo supports vllm{serve.RANGE}")


def resolve_backend(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe with ``rollout.backend: auto`` replaced by what can be had here; a line in the log says why.

    The first process looks, and all take what it found. The backend is then part of the run's identity.

    Raises:
        UserError: the recipe has settings that the backend cannot serve.
    """
    if recipe.rollout.backend != "auto":
        return recipe
    from pydantic import ValidationError  # here, because an engine's Python reads this file too

    from grpo.run.session import on_main

    backend, why = on_main(accelerator, lambda: what_can_be_had(recipe.rollout, accelerator.device.type))
    if accelerator.is_main_process:
        log.info("rollout.backend: auto is %s here: %s", backend, why)
    try:
        return recipe.with_backend(backend)
    except ValidationError as error:
        problems = [problem.text for detail in error.errors() for problem in detail["ctx"]["error"].problems]
        raise UserError("\n".join(f"rollout.backend: auto is {backend} here: {why}. {p}" for p in problems)) from None


def what_can_be_had(rollout: RolloutConfig, device: str) -> tuple[Literal["hf", "vllm"], str]:
    """What ``rollout.backend: auto`` means on a device, and why."""
    from grpo.backends.vllm import serve

    if device != "cuda":
        return "hf", f"training runs on a {device}, and vLLM is for GPUs (rollout.backend: vllm takes it all the same)"
    if rollout.vllm_mode == "server":
        return "vllm", "rollout.vllm_server_base_url names a server"
    if rollout.vllm_python is not None:
        return "vllm", f"rollout.vllm_python is {rollout.vllm_python}"
    version = serve.installed_version()
    if version is None:
        return (
            "hf",
            f"vLLM is not installed here (pip install 'vllm{serve.RANGE}'), nor does rollout.vllm_python say where",
        )
    if not serve.supported(version):
        return "hf", f"vLLM {version} is installed, and grpo supports vllm{serve.RANGE}"
    if serve.for_cpus():
        return "hf", f"the vLLM that is installed ({version}) is its CPU build"
    return "vllm", f"vLLM {version} is installed"


def make_backend(recipe: Recipe, policy: Policy) -> Backend:
    """The backend that the recipe names (``resolve_backend`` comes first), holding no weights yet: ``sync`` is next."""
    rollout = recipe.rollout
    if is_place(rollout.backend):
        from grpo.backends.own import make_own_backend

        return make_own_backend(policy, recipe)
    if rollout.backend == "vllm":
        from grpo.backends.vllm.backend import VLLMBackend

        return VLLMBackend(policy, recipe)
    if rollout.backend != "hf":
        raise ValueError(f"make_backend: rollout.backend is {rollout.backend}; resolve_backend comes first")
    from grpo.backends.hf.backend import HFBackend

    turns = recipe.environment is not None
    return HFBackend(policy, max_batch_size=rollout.max_batch_size, kv_cache_gb=rollout.kv_cache_gb, turns=turns)


def rest(backend: Backend) -> None:
    """Tell a backend that nothing is asked of it until the next ``sync``, if it cares. Every process calls it."""
    if (pause := getattr(backend, "rest", None)) is not None:
        pause()
