"""A secret that a recipe or an override holds is in no file of the run, and is asked for again where it is needed."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo.config.load import LEFT_OUT, load_recipe
from grpo.errors import UserError
from grpo.run import run as run_module
from grpo.run.folder import prepare_run_folder, release_run_folder
from grpo.run.run import Run
from grpo.run.same_run import check_same_run, run_identity
from grpo.run.secrets import recipe_without_secrets, scrubbed
from tests.conftest import make_recipe

RECIPE = """\
model: {name: some/model}
data: {name: countdown}
rewards: [{name: countdown}, {path: "judge.py:judge", args: {eos_token: "<end>", answer_key: solution, limit: 3}}]
training: {output_dir: run}
"""
SECRETS = [
    "rewards.1.args.api_key=hunter2-hunter2",
    "rewards.1.args.password=12345678",
    "rewards.1.args.other=sk-abcdefghijklmnopqrstuv",
    "rewards.1.args.url=https://me:hunter2-hunter2@judge/v1",
    "rewards.1.args.database=Server=db;User=me;Password=hunter2-hunter2;Encrypt=true",
    "rewards.1.args.acme_token=hunter2hunter2",
    "rewards.1.args.hook=https://hooks.slack.com/services/T0/B0/hunter2",
    "rewards.1.args.headers={Authorization: Bearer hunter2-hunter2}",
    "rewards.1.args={api_key: hunter2-hunter2}",
    "data.args={seed: 1, token: hunter2hunter2}",
    "rewards.1.args.from_environment=0123456789-of-the-variable",
]


@pytest.mark.parametrize("override", SECRETS)
def test_a_secret_override_is_in_no_file_of_the_run(tmp_path, monkeypatch, override):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_API_KEY", "0123456789-of-the-variable")
    Path("recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr(sys, "argv", ["grpo", "train", "recipe.yaml", override])
    recipe = load_recipe("recipe.yaml", [override])
    prepare_run_folder(recipe, resume=False)
    release_run_folder(Path("run"))
    secret = next(s for s in ("hunter2", "12345678", "sk-abcdef", "0123456789-of") if s in override)
    for file in filter(Path.is_file, Path("run").rglob("*")):
        assert secret not in file.read_text(), file
    assert LEFT_OUT in json.loads(Path("run/environment.json").read_text())["command"]
    manifest = json.loads(json.dumps(run_identity(recipe, world_size=1, threads=1)))
    assert secret not in json.dumps(manifest)
    with pytest.raises(UserError, match="a secret, which the run left out of its folder; give it again: "):
        load_recipe("run/recipe.yaml")
    again = load_recipe("run/recipe.yaml", [override])
    assert again == recipe
    check_same_run(manifest, run_identity(again, world_size=1, threads=1))
    prepare_run_folder(again, resume=True)
    release_run_folder(Path("run"))


def test_a_checkpoint_from_before_secrets_were_left_out_resumes(tmp_path):
    recipe = make_recipe(tmp_path, rewards=[{"name": "countdown", "args": {"api_key": "hunter2-hunter2"}}])
    before = run_identity(recipe, world_size=1, threads=1) | {"recipe": recipe.model_dump(mode="json")}
    check_same_run(before, run_identity(recipe, world_size=1, threads=1))


def test_what_is_no_secret_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    overrides = ["rewards.1.args.key=name", "rewards.1.args.token=<think>", "rewards.1.args.pad_token=<|reserved_0|>",
                 "rewards.1.args.sort_key=a_long_column_name", "rollout.backend=vllm",
                 "rollout.vllm_args=[--max-num-seqs=4, --api-key, x1]"]  # fmt: skip
    recipe = load_recipe("recipe.yaml", overrides)
    written = recipe_without_secrets(recipe)
    assert written["rollout"]["vllm_args"] == ["--max-num-seqs=4", "--api-key", LEFT_OUT]
    written["rollout"]["vllm_args"][2] = "x1"
    assert written == recipe.model_dump(mode="json")


def test_trackers_do_not_get_it(tmp_path, monkeypatch):
    given = []

    def log_of(folder, tracking, *, recipe_dict, **others):
        given.append(recipe_dict)
        return nullcontext()

    monkeypatch.setattr(run_module, "RunLog", log_of)
    recipe = make_recipe(tmp_path, rewards=[{"name": "countdown", "args": {"api_key": "hunter2-hunter2"}}])
    policy = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True))
    with Run(recipe, policy, tmp_path):
        pass
    assert [one["rewards"][0]["args"] for one in given] == [{"api_key": LEFT_OUT}]


def test_a_traceback_is_scrubbed():
    recipe_without_secrets(
        make_recipe(Path("x"), rewards=[{"name": "countdown", "args": {"secret": "hunter2-hunter2"}}])
    )
    assert scrubbed("401 for hunter2-hunter2, hf_abcdefghijklmnopqrst") == f"401 for {LEFT_OUT}, {LEFT_OUT}"
