"""Recipes with vLLM: names of other projects, and settings that do not fit together, each with sentence and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.config.hints import foreign, unknown_key
from grpo.config.load import load_recipe
from grpo.config.vllm import VllmOptions
from grpo.errors import UserError

RECIPE = """\
model: {name: some/model}
data: {name: countdown}
rewards: [{name: countdown}]
training: {output_dir: runs/test}
rollout:
"""
SERVER = ("backend: vllm", "vllm_mode: server", "vllm_server_base_url: http://127.0.0.1:8000")


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loads a recipe with these lines in `rollout`, the first of them line 6 of the file."""
    monkeypatch.chdir(tmp_path)

    def load(*lines: str):
        Path("recipe.yaml").write_text(RECIPE + "".join(f"  {line}\n" for line in lines))
        return load_recipe("recipe.yaml")

    return load


@pytest.fixture
def problems(load):
    def problems(*lines: str) -> list[str]:
        with pytest.raises(UserError) as caught:
            load(*lines)
        return str(caught.value).splitlines()

    return problems


# --- names of other projects ---


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vllm_server_host", "`vllm_server_host` is `rollout.vllm_server_base_url` here (http://HOST:PORT)"),
        ("vllm_server_port", "`vllm_server_port` is `rollout.vllm_server_base_url` here (http://HOST:PORT)"),
        ("vllm_max_model_len", "`vllm_max_model_len` is `rollout.vllm_max_model_length` here"),
        ("vllm_model_impl", '`vllm_model_impl` is `rollout.vllm_args` here (["--model-impl=..."])'),
        ("vllm_enable_prefix_caching",
         '`vllm_enable_prefix_caching` is `rollout.vllm_args` here (["--enable-prefix-caching"])'),
        ("vllm_importance_sampling_correction",
         "`vllm_importance_sampling_correction` is `algorithm.importance_sampling_mode` here (none turns it off)"),
        ("vllm_importance_sampling_mode",
         "`vllm_importance_sampling_mode` is `algorithm.importance_sampling_mode` here"),
        ("vllm_importance_sampling_cap",
         "`vllm_importance_sampling_cap` is `algorithm.importance_sampling_clip_max` here"),
        ("vllm_importance_sampling_clip_max",
         "`vllm_importance_sampling_clip_max` is `algorithm.importance_sampling_clip_max` here"),
        ("vllm_importance_sampling_clip_min",
         "`vllm_importance_sampling_clip_min` is `algorithm.importance_sampling_clip_min` here"),
        ("use_vllm", "set rollout.backend: vllm, auto (vllm where it can be had) or hf"),
        ("vllm_device", "leave it out: an engine is on the devices of training (vllm_mode: colocate), or on those that "
         "CUDA_VISIBLE_DEVICES gave its server"),
        ("vllm_guided_decoding_regex", "not supported: it changes the sampling distribution"),
        ("vllm_structured_outputs_regex", "not supported: it changes the sampling distribution"),
        ("actor_rollout_ref.rollout.gpu_memory_utilization",
         "`gpu_memory_utilization` is `rollout.vllm_gpu_memory_utilization` here"),
        ("rollout.tensor_model_parallel_size",
         "`tensor_model_parallel_size` is `rollout.vllm_tensor_parallel_size` here"),
        ("free_cache_engine", "`free_cache_engine` is `rollout.vllm_enable_sleep_mode` here"),
        ("enforce_eager", '`enforce_eager` is `rollout.vllm_args` here (["--enforce-eager"])'),
        ("vllm_enable_sleep", "`vllm_enable_sleep` is `rollout.vllm_enable_sleep_mode` here"),
        ("vllm_num_engines",
         "`vllm_num_engines` is `rollout.vllm_server_base_url` here (a list with every server's URL)"),
        ("async_train", "`async_train` is `rollout.max_staleness` here (steps that sampling may be ahead; 1 at least)"),
    ],
)  # fmt: skip
def test_names_of_other_projects(name, hint):
    assert foreign(name) == hint
    assert unknown_key("", name)[0] == f"unknown key: {hint}"


def test_names_of_other_projects_in_a_file(problems):
    lines = ("use_vllm: true", "vllm_server_host: 10.0.0.1", "vllm_importance_sampling_cap: 2.0")
    assert problems(*lines) == [
        "recipe.yaml:6: rollout.use_vllm: unknown key: set rollout.backend: vllm, auto (vllm where it can be had) or "
        "hf",
        "recipe.yaml:7: rollout.vllm_server_host: unknown key: `vllm_server_host` is `rollout.vllm_server_base_url` "
        "here (http://HOST:PORT)",
        "recipe.yaml:8: rollout.vllm_importance_sampling_cap: unknown key: `vllm_importance_sampling_cap` is "
        "`algorithm.importance_sampling_clip_max` here",
    ]


@pytest.mark.parametrize("name", VllmOptions.model_fields)
def test_our_own_names_in_the_wrong_place(name):
    hint = f"unknown key: `{name}` is `rollout.{name}` here"
    assert unknown_key("", name) == unknown_key("training", name) == unknown_key("model.lora", name) == (hint, None)


def test_our_own_names_at_the_top_and_in_a_section_of_their_own(problems):
    assert problems("vllm: {gpu_memory_utilization: 0.5}", "num_generations: 4\nvllm_mode: server") == [
        "recipe.yaml:6: rollout.vllm.gpu_memory_utilization: unknown key: `gpu_memory_utilization` is "
        "`rollout.vllm_gpu_memory_utilization` here",
        "recipe.yaml:8: vllm_mode: unknown key: `vllm_mode` is `rollout.vllm_mode` here",
    ]


def test_a_name_that_nobody_knows_is_not_called_a_typing_slip(problems):
    arguments = 'further arguments of `vllm serve` go in rollout.vllm_args, as ["--max-num-seqs=256"]'
    assert problems("vllm_gpu_memory_utilisation: 0.5", "vllm_gpu_memory: 0.5", "vllm_swap_space: 4") == [
        "recipe.yaml:6: rollout.vllm_gpu_memory_utilisation: unknown key, did you mean vllm_gpu_memory_utilization?",
        "recipe.yaml:7: rollout.vllm_gpu_memory: unknown key, did you mean vllm_gpu_memory_utilization?",
        f"recipe.yaml:8: rollout.vllm_swap_space: unknown key; {arguments}",
    ]


@pytest.mark.parametrize(
    ("lines", "staleness"),
    [(("overlap: true",), 1), (("overlap: false",), 0), (("max_staleness: 3", "overlap: false"), 3), ((), 0)],
)
def test_recipes_and_run_folders_from_before_max_staleness_are_read(load, lines, staleness):
    assert load("backend: vllm", *lines).rollout.max_staleness == staleness


def test_what_was_no_overlap_before_is_explained(problems):
    assert problems("backend: vllm", "overlap: 2") == [
        "recipe.yaml:7: rollout.overlap: unknown key: `overlap` is `rollout.max_staleness` here (1 is what "
        "`overlap: true` was, 0 what false was)"
    ]


# --- settings that do not fit together ---


@pytest.mark.parametrize(
    "lines",
    [
        ("backend: hf", "vllm_mode: colocate", "vllm_args: []"),  # defaults, as a run's resolved recipe writes them
        ("backend: vllm",),
        ("backend: auto", "vllm_gpu_memory_utilization: 0.5", "vllm_python: x", "max_staleness: 3"),
        ("backend: auto", *SERVER[1:], "vllm_group_host: 10.0.0.1"),
        ("backend: my_backend.py:Mine", "max_staleness: 3"),
        ("backend: my_package.backends:Mine",),
        ("backend: vllm", "vllm_enable_sleep_mode: true", "vllm_weight_transfer: ipc"),
        SERVER,
        (*SERVER, "vllm_weight_transfer: nccl", "vllm_group_port: 6000"),
        (*SERVER[:2], "vllm_server_base_url: [http://127.0.0.1:8000, 'https://node2:8000/']"),
    ],
)
def test_what_fits_together(load, lines):
    load(*lines)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["backend: hf", "vllm_mode: server", "vllm_dtype: float32"],
         ["7: rollout: vllm_mode is only used with backend: vllm or auto (backend is hf)",
          "8: rollout: vllm_dtype is only used with backend: vllm or auto (backend is hf)"]),
        (["backend: my_backend.py:Mine", "vllm_mode: server"],
         ["7: rollout: vllm_mode is only used with backend: vllm or auto (backend is my_backend.py:Mine)"]),
        (["backend: vlm"], ["6: rollout.backend: must be auto, hf or vllm, got 'vlm'; did you mean vllm?"]),
        (["backend: 'my_backend.py:'"], ["6: rollout.backend: must be auto, hf or vllm, got 'my_backend.py:'"]),
        (["backend: 3"], ["6: rollout.backend: must be auto, hf or vllm, got 3"]),
        (["num_generations: 4", "max_staleness: 1"],
         ["7: rollout: max_staleness above 0 needs backend: vllm (backend is hf, which samples with the trainer)"]),
        (["backend: vllm", "num_generations: 4", "vllm_mode: server"],
         ["8: rollout: vllm_mode: server needs vllm_server_base_url, such as http://127.0.0.1:8000"]),
        ([*SERVER[:2], "vllm_server_base_url: [http://a:1, 'http://a:1/']"],
         ["8: rollout: vllm_server_base_url names a server twice"]),
        (["backend: vllm", "vllm_weight_transfer: nccl"],
         ["7: rollout: vllm_weight_transfer: nccl needs GPUs of the engine's own, so vllm_mode: server"]),
        ([*SERVER, "vllm_weight_transfer: ipc"],
         ["9: rollout: vllm_weight_transfer: ipc shares memory of one GPU, so it needs vllm_mode: colocate"]),
        (["backend: vllm", SERVER[2], "vllm_group_port: 6000", "vllm_group_host: 10.0.0.1"],
         ["7: rollout: vllm_server_base_url is only used with vllm_mode: server (vllm_mode is colocate)",
          "8: rollout: vllm_group_port is only used with vllm_mode: server (vllm_mode is colocate)",
          "9: rollout: vllm_group_host is only used with vllm_mode: server (vllm_mode is colocate)"]),
        (["backend: auto", "vllm_mode: server"],
         ["7: rollout: vllm_mode: server needs vllm_server_base_url, such as http://127.0.0.1:8000"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(problems, lines, expected):
    assert problems(*lines) == [f"recipe.yaml:{problem}" for problem in expected]


@pytest.mark.parametrize(
    "line",
    [
        "vllm_gpu_memory_utilization: 0.5", "vllm_max_model_length: 512", "vllm_tensor_parallel_size: 2",
        "vllm_enable_sleep_mode: true", "vllm_python: /opt/vllm/bin/python", "vllm_args: [--enforce-eager]",
        "vllm_start_timeout: 60",
    ],
)  # fmt: skip
def test_a_server_has_its_own_command_line(problems, line):
    key = line.partition(":")[0]
    assert problems(*SERVER, "top_p: 0.9", line) == [
        f"recipe.yaml:10: rollout: {key} belongs to the server's own command line (launch/vllm_serve.sh), "
        "vllm_mode is server"
    ]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "ftp://a:1", "http://a:1/v1"])
@pytest.mark.parametrize("several", [False, True])
def test_a_url_is_http_and_a_host(problems, url, several):
    found = problems(*SERVER[:2], "vllm_server_base_url: " + (f"[http://b:1, '{url}']" if several else url))
    assert all(line.startswith("recipe.yaml:8: rollout") and "vllm_server_base_url" in line for line in found)
    assert "http" in found[0]
    assert url in found[0]


def test_an_override_is_named_in_place_of_a_line(load):
    load(*SERVER)
    with pytest.raises(UserError) as caught:
        load_recipe("recipe.yaml", ["rollout.vllm_weight_transfer=ipc"])
    assert str(caught.value).startswith("override rollout.vllm_weight_transfer=ipc: rollout: vllm_weight_transfer: ipc")
