"""Several processes of one job for the price of one start: a script imports everything once, and forks.

Only for scripts: a process that has threads, as pytest's has, must not be forked.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

LAUNCHES: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
}
LAUNCHES["hsdp"] = LAUNCHES["fsdp2"] | {  # of four processes
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


def run_forked(kind: str, processes: int, work: Callable[..., None], *arguments: Any) -> list[int]:
    """``work(*arguments)`` on each of ``processes`` of a launch of a ``kind``. Returns how each ended, as
    ``os.waitstatus_to_exitcode`` says it: 0, or minus the signal that killed it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        sys.stdout.flush()
        if not (child := os.fork()):
            several = {"RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
            several |= {f"LOCAL_{name}": value for name, value in several.items()}
            os.environ.update(several | LAUNCHES[kind], MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            # torch makes its pool of threads anew after a fork. Threads that load weights must not do so at once.
            torch.set_num_threads(torch.get_num_threads())
            status = 1
            try:
                work(*arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
