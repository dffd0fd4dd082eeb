"""Fixtures that several rooms share: a real, tiny, untrained model in a folder, and policies made of it."""

from __future__ import annotations

import os
import signal

# Where tests run behind an & in a script, Ctrl-C is ignored, and so it would be in the processes that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And under nohup the end of a terminal, which a run then does not hear.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Before anything imports torch or transformers, and inherited by the processes that tests start: one thread each, since
# test processes share the cores; no network; nothing of the terminal that the tests were started from.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    WANDB_SILENT="true",
    MPLBACKEND="Agg",
    COLUMNS="200",
)

from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from data.tiny import write_tiny_model
from grpo.config import Recipe
from grpo.model import start as start_module
from grpo.model.loading import load_tokenizer
from grpo.model.policy import Policy
from grpo.run.run import Run

hypothesis.settings.register_profile("busy machine", deadline=None)  # its 0.2 s an example are a matter of the load
hypothesis.settings.load_profile("busy machine")

torch.set_num_threads(1)

LONGEST_FAST_TEST = 3.0  # seconds; marked are tests from one second on, and the rest is slack for a slower machine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Under ``make test-fast`` a test that takes long fails. CPU time counts, not other work's."""
    before = cpu_seconds()
    result = yield
    seconds = cpu_seconds() - before
    if "not slow" in item.config.option.markexpr and seconds > LONGEST_FAST_TEST:
        pytest.fail(f"this test took {seconds:.1f} s of CPU time: mark it @pytest.mark.slow", pytrace=False)
    return result


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


# Targets of their own: `make test-processes` takes minutes, `make test-vllm` needs an environment of its own,
# `make test-nodes` is for root. Each names its folder, which runs it.
collect_ignore = ["processes", "vllm_engine", "several_nodes"]


@pytest.fixture(scope="session", autouse=True)
def _state_of_no_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The key that run folders are signed with is the tests' own, also in processes that they start."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


def make_recipe(folder: Path, **sections: Any) -> Recipe:
    """A recipe of the tiny model in float32; ``sections`` are merged over the defaults, section by section."""
    recipe: dict[str, Any] = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"name": "countdown"},
        "rewards": [{"name": "countdown"}],
        "training": {"output_dir": "unused"},
    }
    for name, content in sections.items():
        recipe[name] = recipe.get(name, {}) | content if isinstance(content, dict) else content
    if "mix" in recipe["data"]:
        recipe["data"].pop("name")  # its sources say where rows are from
    return Recipe.model_validate(recipe)


def make_policy(
    folder: Path,
    *,
    dtype: str = "float32",
    sharpen: float = 1.0,
    causal_lm: Any = None,
    needs_reference: bool = False,
    **sections: Any,
) -> Policy:
    """A policy of the tiny model, or of ``causal_lm``; ``sharpen`` multiplies its weights, for peaked distributions."""
    sections["model"] = {"name": str(folder), "dtype": dtype} | sections.get("model", {})
    recipe = make_recipe(folder, **sections)
    tokenizer = load_tokenizer(recipe.model)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process makes several
    accelerator = Accelerator(cpu=True)
    with pytest.MonkeyPatch.context() as patch:
        if causal_lm is not None:
            patch.setattr(start_module, "load_weights", lambda *_: causal_lm)
        policy = Policy(recipe, accelerator, tokenizer, [tokenizer.eos_token_id], needs_reference)
    if sharpen != 1.0:
        with torch.no_grad():
            policy.causal_lm.get_input_embeddings().weight.mul_(sharpen)
    return policy


def make_run(policy: Policy, folder: Path = Path("unused"), **sections: Any) -> Run:
    """A run of the policy that is at its start; ``sections`` of its recipe are those of ``make_recipe``."""
    return Run(make_recipe(Path("x"), **sections), policy, folder)
