"""Launch files: accelerate reads its configurations; the Slurm script hands out ranks, resumes and requeues."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

LAUNCH = Path(__file__).parents[1] / "launch"

STUBS = {
    "scontrol": 'echo "scontrol $*" >> "$LOG"; [ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0',
    "srun": """while [[ "$1" == --* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@"; status=$?; done; exit $status""",
    "grpo": 'echo "$RANK/$WORLD_SIZE local $LOCAL_RANK/$LOCAL_WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT'
    ' fsdp ${ACCELERATE_USE_FSDP:-no}: $*" >> "$LOG"; exit "$EXIT"',
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
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
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

    return run


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.name)
def test_every_yaml_starts_the_command(file):
    text = file.read_text()
    assert "grpo train" in text
    if "compute_environment" in yaml.safe_load(text):
        assert load_config_from_file(str(file)).num_processes == 2


def test_slurm_hands_out_ranks_and_resumes(slurm):
    done, log = slurm("my recipe.yaml", "training.seed=1", EXIT="0")
    assert done.returncode == 0
    assert log == [
        "scontrol show hostnames node[1-2]",
        "0/2 local 0/2 at node1:20007 fsdp no: train my recipe.yaml training.seed=1 --resume",
        "1/2 local 1/2 at node1:20007 fsdp no: train my recipe.yaml training.seed=1 --resume",
    ]


def test_slurm_shards_when_asked(slurm):
    _, log = slurm("r.yaml", EXIT="0", SHARD="fsdp2")
    assert all("fsdp true:" in line for line in log[1:])
    done, _ = slurm("r.yaml", EXIT="0", SHARD="zero3")
    assert done.returncode == 2
    assert "SHARD is fsdp2 or none, not zero3" in done.stderr


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
