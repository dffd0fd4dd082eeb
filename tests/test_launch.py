"""Launch files: accelerate reads its own; Slurm's hands out ranks, resumes and requeues; vLLM's finds its Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

LAUNCH = Path(__file__).parents[1] / "launch"

STUBS = {
    "scontrol": 'echo "scontrol $*" >> "$LOG"; [ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0',
    "srun": """while [[ "$1" == --* ]]; do shift; done
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$rank SLURM_LOCALID=$((rank % (SLURM_NTASKS / SLURM_NNODES))) "$@"; status=$?
done; exit $status""",
    "grpo": 'echo "$RANK/$WORLD_SIZE local $LOCAL_RANK/$LOCAL_WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT'
    " fsdp ${ACCELERATE_USE_FSDP:-no}${PARALLELISM_CONFIG_DP_REPLICATE_SIZE:+ ${PARALLELISM_CONFIG_DP_REPLICATE_SIZE}x"
    '$PARALLELISM_CONFIG_DP_SHARD_SIZE}: $*" >> "$LOG"; exit "$EXIT"',
}


@pytest.fixture
def slurm(tmp_path):
    for name, script in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/usr/bin/env bash\n{script}\n")
        stub.chmod(0o755)

    def run(*arguments, **environment):
        job = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS": "2",
        }
        own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GRPO": str(tmp_path / "grpo"), "LOG": str(tmp_path / "log")}
        done = subprocess.run(
            ["bash", LAUNCH / "slurm.sh", *arguments],
            env=job | own | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        log = tmp_path / "log"
        return done, log.read_text().splitlines() if log.exists() else []

    run.folder = tmp_path
    return run


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.name)
def test_every_yaml_starts_the_command(file):
    text = file.read_text()
    assert "grpo train" in text
    if "compute_environment" in yaml.safe_load(text):
        assert load_config_from_file(str(file)).num_processes == (4 if file.name == "hsdp.yaml" else 2)


def test_what_hsdp_yaml_tells_the_processes():
    """accelerate's names in the file, and ours in session.hybrid_sharding, are those that it passes on."""
    args = launch_command_parser().parse_args(
        ["--config_file", str(LAUNCH / "hsdp.yaml"), "--parallelism_config_dp_shard_size=8", "-m", "grpo"]
    )
    args, _, _ = _validate_launch_command(args)
    told = prepare_multi_gpu_env(args)
    assert told["ACCELERATE_USE_FSDP"] == told["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert told["FSDP_VERSION"] == "2"
    assert told["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "2"
    assert told["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8", "the command line's stands before the file's"


def test_slurm_hands_out_ranks_and_resumes(slurm):
    done, log = slurm("my recipe.yaml", "training.seed=1", EXIT="0")
    assert done.returncode == 0
    assert log == [
        "scontrol show hostnames node[1-2]",
        "0/2 local 0/2 at node1:20007 fsdp no: train my recipe.yaml training.seed=1 --resume",
        "1/2 local 1/2 at node1:20007 fsdp no: train my recipe.yaml training.seed=1 --resume",
    ]


def test_slurm_tells_the_processes_of_two_nodes_which_they_are(slurm):
    _, log = slurm("r.yaml", EXIT="0", SLURM_NNODES="2", SLURM_NTASKS="4", SLURM_NTASKS_PER_NODE="2")
    told = [line.partition(" at node1")[0] for line in log[1:]]
    assert told == ["0/4 local 0/2", "1/4 local 1/2", "2/4 local 0/2", "3/4 local 1/2"]


def test_slurm_shards_when_asked(slurm):
    _, log = slurm("r.yaml", EXIT="0", SHARD="fsdp2")
    assert all("fsdp true:" in line for line in log[1:])
    (slurm.folder / "log").unlink()
    _, log = slurm("r.yaml", EXIT="0", SHARD="hsdp", SLURM_NTASKS="16", SLURM_NTASKS_PER_NODE="8")
    assert all("fsdp true 2x8:" in line for line in log[1:])
    done, _ = slurm("r.yaml", EXIT="0", SHARD="zero3")
    assert done.returncode == 2
    assert "SHARD is fsdp2, hsdp or none, not zero3" in done.stderr


@pytest.mark.parametrize(("status", "requeued"), [("143", True), ("1", False), ("2", False)])
def test_slurm_requeues_what_was_preempted_and_nothing_else(slurm, status, requeued):
    done, log = slurm("r.yaml", EXIT=status)
    assert done.returncode == int(status)
    assert ("scontrol requeue 7" in log) is requeued


def test_slurm_without_a_recipe_says_how(slurm):
    done, log = slurm(EXIT="0")
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr
    assert log == []


@pytest.fixture
def vllm_serve(tmp_path):
    """Runs the script from a checkout of its own, whose Pythons are stand-ins that tell what they were called with."""
    checkout = tmp_path / "check out"
    (checkout / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "vllm_serve.sh", checkout / "launch")
    stub = """#!/bin/sh
echo "$0"; echo "$PYTHONPATH"; echo "${VLLM_PYTHON-unset}"; for a in "$@"; do echo "$a"; done"""
    for name in ("python3", "own python", "check out/.venv-vllm/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(stub)
        (tmp_path / name).chmod(0o755)

    def run(*arguments, **environment):
        return subprocess.run(
            [checkout / "launch/vllm_serve.sh", *arguments],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    run.checkout = checkout
    return run


def test_vllm_serve_runs_the_module_from_the_checkout(vllm_serve):
    done = vllm_serve("some/model", "--port", "8000", "a b", PYTHONPATH="/elsewhere")
    root = vllm_serve.checkout
    told = ["-m", "grpo.backends.vllm.serve", "some/model", "--port", "8000", "a b"]
    assert done.stdout.splitlines() == [f"{root}/.venv-vllm/bin/python", f"{root}:/elsewhere", "unset", *told]
    assert (done.returncode, done.stderr) == (0, "")


def test_vllm_serve_takes_the_python_it_is_given_then_the_checkouts_then_any(vllm_serve, tmp_path):
    given = vllm_serve("m", VLLM_PYTHON=str(tmp_path / "own python"))
    assert given.stdout.splitlines()[:3] == [f"{tmp_path}/own python", str(vllm_serve.checkout), "unset"]
    assert vllm_serve("m").stdout.splitlines()[0] == f"{vllm_serve.checkout}/.venv-vllm/bin/python"
    shutil.rmtree(vllm_serve.checkout / ".venv-vllm")
    assert vllm_serve("m").stdout.splitlines()[0] == f"{tmp_path}/python3"


@pytest.mark.parametrize("arguments", [(), ("--port", "8000"), ("--help",)])
def test_vllm_serve_without_a_model_says_how(vllm_serve, arguments):
    done = vllm_serve(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: launch/vllm_serve.sh MODEL")


def test_vllm_serve_ends_as_the_server_does(vllm_serve):
    server = vllm_serve.checkout / ".venv-vllm/bin/python"
    server.write_text("#!/bin/sh\nexit 7\n")
    assert vllm_serve("m").returncode == 7


def skypilot(folder: Path, **environment: str) -> list[str]:
    """What the file's run section calls on a node, argument by argument."""
    stub = folder / ".venv/bin/accelerate"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
    stub.chmod(0o755)
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    done = subprocess.run(
        ["bash", "-euc", task["run"]],
        env={"PATH": os.environ["PATH"]} | task["envs"] | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("rank", [0, 1])
def test_skypilot_starts_one_launcher_a_node_and_all_meet_at_the_first(tmp_path, rank):
    node = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "10.1.0.4\n10.1.0.5",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }
    called = skypilot(tmp_path, SHARD="fsdp2", **node)
    parsed = launch_command_parser().parse_args(called[1:])
    assert called[0] == "launch"
    assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 16, rank)
    assert (parsed.main_process_ip, parsed.main_process_port) == ("10.1.0.4", 29500)
    assert load_config_from_file(parsed.config_file).distributed_type == "FSDP"
    assert [parsed.training_script, *parsed.training_script_args] == [
        *("grpo", "train", "recipes/countdown_qwen2.5-3b.yaml"),
        *("training.output_dir=/runs/countdown_qwen2.5-3b", "--resume"),
    ]
