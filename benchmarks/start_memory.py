"""Memory of the host that a start takes on several processes: python -m benchmarks.start_memory [--shape 1.5b].

Makes a folder with a model of that shape (random weights in bfloat16), starts its policy on processes of a CPU machine,
as DDP and as FSDP2 do, and prints the largest memory of all processes together while it starts, and what they hold
afterwards, in GB. Memory is the kernel's proportional share (PSS): a page that several processes see counts once. On a
GPU machine the weights are on the devices afterwards, here they are in the same memory; what is beyond them is the cost
of the start. To compare with another version, copy this file into its benchmarks/ and run it there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.gpu.models import model_folder

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def share(process: int) -> dict[str, int]:
    """Bytes of a process: all that it holds, and what of it no file backs."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    found = {name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines[1:])}
    return {"held": found["Pss"], "without files": found["Pss_Anon"]}


def start_and_wait(folder: str, beta: float) -> None:
    """In a process of its own: start a policy, say so, and hold it."""
    import torch

    torch.set_num_threads(1)
    from grpo.config import Recipe
    from grpo.model.loading import load_tokenizer
    from grpo.model.policy import Policy
    from grpo.run.session import make_accelerator

    recipe = Recipe.model_validate(
        {
            "model": {"name": folder, "dtype": "bfloat16"},
            "data": {"name": "countdown"},
            "rewards": [{"name": "countdown"}],
            "algorithm": {"beta": beta},
            "training": {"output_dir": "unused", "prompts_per_step": 8},
        }
    )
    print("imported", flush=True)
    sys.stdin.readline()
    policy = Policy(recipe, make_accelerator(recipe), load_tokenizer(recipe.model), [1], beta > 0)
    print("started", flush=True)
    sys.stdin.readline()
    del policy
    os._exit(0)  # what they hold is nobody's any more


def measure(folder: Path, kind: dict[str, str], processes: int, beta: float, port: int) -> dict[str, Any]:
    """Gigabytes over all processes, beyond those of their imports."""
    several = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.start_memory", "--within", str(folder), "--beta", str(beta)]
    running = [
        subprocess.Popen(
            command,
            env=os.environ | several | address | kind | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]

    def together() -> dict[str, int]:
        parts = [share(process.pid) for process in running]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def all_say(word: str) -> None:
        for process in running:
            if word not in (line := process.stdout.readline()):
                raise RuntimeError(f"a process ended before it {word}: {line!r}")

    def all_go_on() -> None:
        for process in running:
            process.stdin.write("\n")
            process.stdin.flush()

    try:
        all_say("imported")
        before, peak, over = together(), {"held": 0, "without files": 0}, threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                for name, size in together().items():
                    peak[name] = max(peak[name], size)

        watcher = threading.Thread(target=watch)
        watcher.start()
        begun = time.monotonic()
        all_go_on()
        all_say("started")
        seconds = time.monotonic() - begun
        over.set()
        watcher.join()
        after = together()
        all_go_on()
    finally:
        for process in running:
            process.kill()
            process.wait()
    sizes = {f"peak {name}": peak[name] - before[name] for name in peak}
    sizes |= {f"after {name}": after[name] - before[name] for name in after}
    return {name: round(size / 1e9, 2) for name, size in sizes.items()} | {"seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of the host that a start takes on several processes.")
    parser.add_argument("--shape", default="0.5b", help="of benchmarks/gpu/shapes.py")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--beta", type=float, default=0.0, help="above 0, a reference model is started too")
    parser.add_argument("--within", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.within:
        start_and_wait(arguments.within, arguments.beta)
        return
    with model_folder(arguments.shape) as folder:
        size = (folder / "model.safetensors").stat().st_size
        print(json.dumps({"shape": arguments.shape, "file": round(size / 1e9, 2), "root": str(ROOT)}), flush=True)
        for number, (name, kind) in enumerate({"ddp": {}, "fsdp2": FSDP2}.items()):
            found = measure(folder, kind, arguments.processes, arguments.beta, 29711 + number)
            print(json.dumps({"launch": name, "processes": arguments.processes} | found), flush=True)


if __name__ == "__main__":
    main()
