"""A run folder holds one run: used, locked and unwritable ones are refused before anything is loaded or changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from grpo.config import Recipe
from grpo.config.load import load_recipe
from grpo.errors import UserError
from grpo.run.folder import environment, prepare_run_folder, release_run_folder
from grpo.run.run import say_if_schedule_changes
from grpo.run.same_run import check_same_run, run_identity


def make(folder: Path, **changes: object) -> Recipe:
    values = {
        "model": {"name": "tiny"},
        "data": {"name": "countdown"},
        "rewards": [{"name": "countdown"}],
        "training": {"output_dir": str(folder), "seed": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return Recipe.model_validate(values)


@pytest.fixture
def folder(tmp_path):
    yield tmp_path / "runs" / "a"
    release_run_folder(tmp_path / "runs" / "a")


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_new_run_is_described(folder):
    recipe = make(folder, optimizer__learning_rate=1e-6)
    assert prepare_run_folder(recipe, resume=False) == folder
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoints/step_000001/x", "final/config.json", "rollouts/r.jsonl"]
)
def test_a_used_folder_is_refused_untouched_with_both_cures(folder, name):
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("{}\n")
    before = contents(folder)
    with pytest.raises(UserError) as refusal:
        prepare_run_folder(make(folder), resume=False)
    message = str(refusal.value)
    assert name.partition("/")[0] in message
    assert "--resume" in message
    assert f"training.output_dir={folder}-2" in message
    assert contents(folder) == before


def test_a_run_that_failed_before_its_first_step_can_be_repeated(folder):
    prepare_run_folder(make(folder), resume=False)
    release_run_folder(folder)
    prepare_run_folder(make(folder, training__seed=2), resume=False)
    assert load_recipe(folder / "recipe.yaml").training.seed == 2
    assert load_recipe(folder / "recipe.previous.yaml").training.seed == 1


def test_resuming_keeps_the_former_recipe_and_refuses_another_run(folder):
    prepare_run_folder(make(folder), resume=False)
    release_run_folder(folder)
    (folder / "checkpoints" / "step_000010").mkdir(parents=True)
    before = contents(folder)
    with pytest.raises(UserError, match=r"training\.seed: 1 -> 7"):
        prepare_run_folder(make(folder, training__seed=7), resume=True)
    assert contents(folder) == before
    prepare_run_folder(make(folder, training__max_steps=500), resume=True)
    assert load_recipe(folder / "recipe.yaml").training.max_steps == 500
    assert load_recipe(folder / "recipe.previous.yaml").training.max_steps == 100


HOLD = """
import sys
from grpo.config.load import load_recipe
from grpo.run.folder import prepare_run_folder
prepare_run_folder(load_recipe(sys.argv[1]), resume=False)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_where_the_disk_refuses_the_former_recipe_stays(folder, monkeypatch):
    prepare_run_folder(make(folder), resume=False)
    release_run_folder(folder)
    before = {name: (folder / name).read_bytes() for name in ("recipe.yaml", "environment.json")}
    write = Path.write_bytes

    def full(path, data):
        if path.name == "recipe.yaml.tmp":
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        prepare_run_folder(make(folder, training__max_steps=7), resume=True)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_folder_locked_by_a_live_run_is_refused_and_free_once_that_run_is_killed(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make(folder).model_dump()))
    command = [sys.executable, "-c", HOLD, str(recipe)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()) as other:
        assert other.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(UserError, match=f"in use by a live run \\(process {other.pid} on "):
                prepare_run_folder(make(folder), resume=resume)
        other.kill()
        other.wait()
    prepare_run_folder(make(folder), resume=True)


def test_one_process_cannot_run_twice_in_a_folder_until_it_releases_it(folder):
    prepare_run_folder(make(folder), resume=False)
    with pytest.raises(UserError, match="already runs"):
        prepare_run_folder(make(folder), resume=True)
    release_run_folder(folder)
    prepare_run_folder(make(folder), resume=True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir: cannot write to .*file/run: Not a directory"):
        prepare_run_folder(make(tmp_path / "file" / "run"), resume=False)
    with pytest.raises(UserError, match="cannot write to /proc/run"):
        prepare_run_folder(make(Path("/proc/run")), resume=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_refused(folder):
    folder.mkdir(parents=True, mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        prepare_run_folder(make(folder), resume=False)


def test_the_environment_says_what_and_where(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/grpo", "train", "my recipe.yaml"])
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "grpo train 'my recipe.yaml'"
    assert found["cpu"]["cores"] >= 1
    assert found["cpu"]["memory_gb"] > 0
    assert "secret" not in json.dumps(found)
    monkeypatch.setattr(sys, "argv", ["/lib/grpo/__main__.py", "train", "r"])
    assert environment()["command"] == "python -m grpo train r"


# ---------------------------------------------------------------------------------------------------------------------
# same_run


def identity(folder: Path = Path("x"), world_size: int = 1, threads: int = 2, **changes: object) -> dict:
    return run_identity(make(folder, **changes), world_size=world_size, threads=threads)


def stored(**extra: object) -> dict:
    return json.loads(json.dumps({"step": 3, "files": {}, **identity(), **extra}))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"training__seed": 2}, r"training\.seed: 1 -> 2"),
        ({"model__name": "big"}, r'model\.name: "tiny" -> "big"'),
        ({"model__lora": {"r": 8}}, r'model\.lora: null -> \{"r": 8'),
        ({"threads": 1}, r"threads: 2 -> 1"),
        ({"optimizer__weight_decay": 0.1}, r"optimizer\.weight_decay: 0.0 -> 0.1"),
    ],
)
def test_another_run_is_refused_by_the_keys_that_differ(changes, line):
    with pytest.raises(UserError, match=line) as refusal:
        check_same_run(stored(), identity(**changes))
    assert len(str(refusal.value).splitlines()) == 3


def test_what_may_change_passes_in_silence(caplog):
    now = identity(Path("moved"), training__max_steps=9, tracking__wandb="offline", optimizer__offload=True)
    check_same_run(stored(), now)
    of_a_server = {"rollout__backend": "vllm", "rollout__vllm_mode": "server"}
    before = identity(**of_a_server, rollout__vllm_server_base_url="http://a:1")
    moved = {"rollout__vllm_server_base_url": "http://b:1", "rollout__vllm_group_host": "10.0.0.1"}
    check_same_run(before, identity(**of_a_server, **moved, rollout__vllm_server_timeout=9.0))
    assert caplog.text == ""


def test_keys_that_came_later_have_their_defaults_in_an_earlier_run(caplog):
    earlier = stored()
    del earlier["recipe"]["model"]["weights"], earlier["recipe"]["optimizer"]["offload"]
    check_same_run(earlier, identity())
    assert caplog.text == ""
    with pytest.raises(UserError, match=r'model\.weights: "float32" -> "bfloat16"'):
        check_same_run(earlier, identity(model__weights="bfloat16"))


def test_keys_that_are_newer_than_a_checkpoint_have_their_defaults_in_it():
    manifest = stored()
    del manifest["recipe"]["rollout"]["max_staleness"], manifest["recipe"]["algorithm"]["pass_at_k"]
    manifest["recipe"]["rollout"]["overlap"] = False  # a key of then
    check_same_run(manifest, identity())
    with pytest.raises(UserError, match=r"\n  rollout\.max_staleness: 0 -> 2\n"):
        check_same_run(manifest, identity(rollout__backend="vllm", rollout__max_staleness=2))


def test_what_rounds_differently_passes_with_a_warning(caplog):
    versions = stored()["versions"] | {"torch": "2.8.0"}
    check_same_run(stored(versions=versions), identity(training__micro_batch_tokens=1024))
    assert "training.micro_batch_tokens: null -> 1024" in caplog.text
    assert 'versions.torch: "2.8.0"' in caplog.text


def test_another_number_of_processes_is_the_same_run_to_rounding(caplog):
    """Its launch may have set another number of threads."""
    check_same_run(stored(), identity(world_size=4, threads=1))
    assert "not equal to the bit" in caplog.text
    assert "world_size: 1 -> 4" in caplog.text
    assert "threads: 2 -> 1" in caplog.text


def test_what_a_run_that_does_not_go_well_needs_passes_with_a_line(caplog):
    """The NaN stop advises a lower learning rate."""
    changes = {"optimizer__learning_rate": 1e-7, "optimizer__max_grad_norm": 0.1, "model__kernels": "none"}
    check_same_run(stored(), identity(**changes))
    assert len(caplog.messages) == 1
    assert "optimizer.learning_rate: 1e-06 -> 1e-07" in caplog.text
    assert "optimizer.max_grad_norm: 1.0 -> 0.1" in caplog.text


def test_time_limits_and_places_pass_in_silence(caplog):
    engine = {"rollout__backend": "vllm", "rollout__vllm_mode": "server", "rollout__vllm_server_base_url": "http://a:1"}
    moved = {
        "rollout__vllm_server_base_url": ["http://b:1", "http://c:1"],
        "rollout__vllm_group_port": 9,
        "rollout__vllm_generation_timeout": 9.0,
        "rollout__vllm_sync_timeout": 9.0,
        "rewards": [{"name": "countdown", "timeout": 3.0}],
        "scoring": {"timeout": 99.0, "workers": 7},
        "training__ddp_timeout": 60.0,
    }
    check_same_run(identity(**engine), identity(**(engine | moved)))
    assert caplog.text == ""
    with pytest.raises(UserError, match=r"rewards\.0\.weight: 1\.0 -> 2\.0"):
        check_same_run(identity(), identity(rewards=[{"name": "countdown", "weight": 2.0}]))
    with pytest.raises(UserError, match=r"rewards\.1: absent"):
        check_same_run(identity(), identity(rewards=[{"name": "countdown"}, {"name": "format"}]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training__max_steps": 200}, "(training.max_steps: 100 -> 200)"),
        ({"optimizer__lr_scheduler_type": "constant"}, '(optimizer.lr_scheduler_type: "cosine" -> "constant")'),
        ({"training__max_steps": 200, "optimizer__warmup_steps": 60}, None),  # still warming up, at another rate
        ({"training__max_seconds": 9.0}, ""),
    ],
)
def test_a_learning_rate_that_jumps_says_from_what_to_what(caplog, changes, says):
    schedule = {"optimizer__lr_scheduler_type": "cosine", "optimizer__learning_rate": 1e-3}
    before = stored(**identity(**schedule)) | {"step": 50}
    say_if_schedule_changes(before, make(Path("x"), **(schedule | changes)))
    if says == "":
        assert caplog.text == ""
    else:
        assert "the learning rate of step 51 is 0.00" in caplog.text
        assert "would have been 0.0005" in caplog.text
        assert says is None or says in caplog.text


def test_gpus_do_not_count_the_threads_of_their_host():
    now = identity()
    del now["threads"]
    check_same_run(stored(), now)


def test_a_recipe_that_was_cut_off_does_not_stop_a_resume(folder):
    """The checkpoint has its own."""
    prepare_run_folder(make(folder), resume=False)
    release_run_folder(folder)
    (folder / "checkpoints" / "step_000010").mkdir(parents=True)
    (folder / "recipe.yaml").write_bytes(b"model: {name: tiny\n\xff")
    prepare_run_folder(make(folder), resume=True)
    assert load_recipe(folder / "recipe.yaml") == make(folder)
