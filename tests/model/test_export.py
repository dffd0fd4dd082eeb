"""``final/`` can be written whatever the model came with, or the start says what can't; and it is there whole."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from grpo.errors import RunError, UserError
from grpo.model.export import rehearse
from grpo.model.loading import load_configs
from tests.conftest import make_policy, make_recipe

LORA = {"lora": {"r": 4}}


def with_json(tiny_model: Path, folder: Path, file: str, **content: Any) -> Path:
    """A copy of the tiny model with ``content`` merged into one of its JSON files."""
    shutil.copytree(tiny_model, folder)
    path = folder / file
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | content))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.9},
        {"do_sample": False, "top_p": 0.5, "top_k": 7},
        {"do_sample": False, "typical_p": 0.9},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_generation_config_that_transformers_would_not_write_reaches_final_as_it_is(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    folder = with_json(tiny_model, tmp_path / "model", "generation_config.json", **settings)
    with pytest.raises(ValueError, match="Fix these issues"):
        GenerationConfig.from_pretrained(folder).save_pretrained(tmp_path / "refused")
    caplog.set_level(logging.WARNING, "grpo")
    policy = make_policy(folder)
    assert "its generation configuration goes into final/ as it is" in caplog.text
    policy.save_pretrained(tmp_path / "final")
    written = json.loads((tmp_path / "final/generation_config.json").read_text())
    assert {name: written[name] for name in settings} == settings
    assert written["eos_token_id"] == policy.causal_lm.generation_config.eos_token_id
    make_policy(tmp_path / "final")  # a later stage starts from it


def test_a_config_with_settings_of_generation_is_written_without(tiny_model: Path, tmp_path: Path) -> None:
    """Older models have them there; transformers reads them and refuses to write them."""
    folder = with_json(tiny_model, tmp_path / "model", "config.json", temperature=0.7, max_length=100, do_sample=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    policy = make_policy(folder)
    policy.save_pretrained(tmp_path / "final")
    assert "temperature" not in json.loads((tmp_path / "final/config.json").read_text())
    assert GenerationConfig.from_pretrained(tmp_path / "final").temperature == 0.7


def test_a_generation_config_that_can_t_be_read_is_a_user_error(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_json(tiny_model, tmp_path / "model", "generation_config.json", max_new_tokens=-3)
    with pytest.raises(UserError, match=r"can't load the generation configuration of .*max_new_tokens"):
        load_configs(make_recipe(folder).model)


def test_a_tokenizer_that_can_t_be_written_is_found_at_the_start(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("Object of type set is not JSON serializable")

    tokenizer.save_pretrained = refuse
    causal_lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(UserError, match=r"the tokenizer of this model can't be written.*not JSON serializable"):
        rehearse(causal_lm, causal_lm.state_dict(), tokenizer, trust_remote_code=False)


def test_weights_that_are_shared_unknown_to_the_model_are_found_at_the_start(tiny_model: Path) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    first, second = causal_lm.model.layers[:2]
    second.mlp.down_proj.weight = first.mlp.down_proj.weight
    with pytest.raises(UserError, match=r"the weights of this model can't be written.*shared tensors"):
        make_policy(tiny_model, causal_lm=causal_lm)


def test_the_rehearsal_leaves_the_model_as_it_is(tiny_model: Path) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = {name: (id(p), p.clone()) for name, p in causal_lm.named_parameters()}
    config = causal_lm.config.to_dict()
    make_policy(tiny_model, causal_lm=causal_lm)
    assert causal_lm.config.to_dict() == config
    for name, p in causal_lm.named_parameters():
        assert id(p) == before[name][0]
        assert torch.equal(p, before[name][1])


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within it the system refuses to write more than so many bytes into a file, as a full disk does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 1000, 100_000], ids=["none", "for a file", "for all but the weights"])
def test_where_the_disk_refuses_there_is_no_half_final(tiny_model: Path, tmp_path: Path, room: int) -> None:
    policy, final = make_policy(tiny_model, model=LORA), tmp_path / "final"
    for there in (False, True):
        with files_up_to(room), pytest.raises(RunError, match=r"could not write .*final: .*give --resume"):
            policy.save_pretrained(final)
        assert [path.name for path in tmp_path.iterdir()] == ["final"] * there
        if not there:
            policy.save_pretrained(final)
    AutoModelForCausalLM.from_pretrained(final)


def test_all_files_of_final_have_the_mode_of_any_new_file(tiny_model: Path, tmp_path: Path) -> None:
    make_policy(tiny_model, model=LORA).save_pretrained(tmp_path / "final")
    (tmp_path / "new").touch()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"model.safetensors", "adapter_model.safetensors", "config.json"} <= {path.name for path in files}
    assert {path.stat().st_mode for path in files} == {(tmp_path / "new").stat().st_mode}
