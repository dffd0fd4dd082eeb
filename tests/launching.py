"""Starting real processes from tests: one by itself, or several under accelerate over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FSDP2 = [
    "--use_fsdp",
    "--fsdp_version=2",
    "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
    "--fsdp_cpu_ram_efficient_loading=false",
    "--fsdp_reshard_after_forward=true",
    "--fsdp_state_dict_type=FULL_STATE_DICT",
]
DDP = ["--multi_gpu"]  # accelerate's name for its torchrun launcher, gloo on a CPU


# The beginning of a script: it is killed right after its n-th fsync, rename, mkdir or rmtree.
DIES = """
    import os, shutil, signal

    def die_after(moment):
        count = 0
        def deadly(function):
            def call(*args, **kwargs):
                nonlocal count
                result = function(*args, **kwargs)
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            return call
        for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree")):
            setattr(module, name, deadly(getattr(module, name)))
"""


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def run_python(*arguments: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


def how_parts_ended(script: str, folder: Path) -> tuple[dict[str, list[int]], str]:
    """Run a script of tests/processes, which prints how the processes of each of its parts ended, and what it said."""
    done = run_python(ROOT / "tests/processes" / script, folder)
    print(done.stderr)  # pytest shows it with a failure
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(kind: list[str], *arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` a script or ``-m module`` on ``processes`` processes."""
    common = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    return run_python("-m", "accelerate.commands.launch", *kind, f"--num_processes={processes}", *common, *arguments)
