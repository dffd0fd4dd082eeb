"""A colocated engine: vLLM's server as a child of the training process, on the same device."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch

import grpo
from grpo.backends.vllm.api import UNIX
from grpo.config import Recipe, RolloutConfig
from grpo.errors import UserError
from grpo.model.policy import Policy

PACKAGE = Path(grpo.__file__).resolve().parent
SECONDS_TO_STOP = 20.0
LINES_OF_LOG = 12
LONGEST_SOCKET = 107  # bytes of a Unix socket's path
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM accepts these as --max-lora-rank


class EngineProcess:
    """Starts, stops and restarts one server. The server dies with this process, however this process dies.

    It listens on a Unix socket in ``private``, a folder that only this user may enter: whoever reaches a server can
    replace its weights.
    """

    def __init__(
        self,
        model: Path,
        arguments: list[str],
        python: str | None,
        devices: list[int],
        *,
        log: Path,
        scratch: Path,
        private: Path,
    ):
        self.socket = private / "engine.sock"
        if len(os.fsencode(self.socket)) > LONGEST_SOCKET:
            raise UserError(
                f"{self.socket} is too long for a socket's path ({LONGEST_SOCKET} bytes): set TMPDIR to a shorter one"
            )
        self.url = f"{UNIX}{self.socket}"
        self.log = log
        self.command = [python or sys.executable, "-m", "grpo.backends.vllm.serve", "--die-with", str(os.getpid())]
        self.command += [str(model), f"--uds={self.socket}", *arguments]
        self.environment = _environment(devices, _only_grpo(scratch))
        # The engine's processes talk to each other over sockets too, and unpickle what comes there.
        self.environment["VLLM_RPC_BASE_PATH"] = str(private)
        self.starting = False  # started, and has not answered yet
        self.started = 0.0  # when, by time.monotonic
        self.process: subprocess.Popen[bytes] | None = None
        self.output: IO[bytes] | None = None

    def start(self) -> None:
        """Start it unless it runs. Returns before it answers."""
        if self.exit_code() is None and self.process is not None:
            return
        self.stop()
        self.starting, self.started = True, time.monotonic()
        self.socket.unlink(missing_ok=True)  # a killed server leaves it, and the next could not bind it
        self.output = self.log.open("ab")
        # A session of its own: Ctrl-C is the trainer's to handle, and stop() reaches vLLM's children too.
        try:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"rollout.vllm_python: cannot start {self.command[0]}: {error.strerror}") from None

    def exit_code(self) -> int | None:
        """None while it runs, or before it was started."""
        return self.process.poll() if self.process else None

    def last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(f"  {line}" for line in lines[-LINES_OF_LOG:])

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_TO_STOP)
            with contextlib.suppress(ProcessLookupError):  # kills children that it left
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        if self.output is not None:
            self.output.close()
            self.output = None


def engine_sleeps(recipe: Recipe, *, on_gpu: bool) -> bool:
    """Whether a colocated engine gives up its memory during updates.

    Raises:
        UserError: it shall, and cannot.
    """
    asked, busy = recipe.rollout.vllm_enable_sleep_mode, recipe.rollout.max_staleness > 0
    if asked and not on_gpu:
        raise UserError("rollout.vllm_enable_sleep_mode needs a GPU: vLLM does not support it on CPUs")
    if asked and busy:
        raise UserError(
            "rollout.vllm_enable_sleep_mode: an engine cannot sleep during updates with rollout.max_staleness above 0, "
            "which samples then; leave one of them out"
        )
    return on_gpu and not busy if asked is None else asked


def make_engine(recipe: Recipe, policy: Policy, scratch: Path, private: Path) -> EngineProcess | None:
    """The engine of this process's group, not yet started. None on all but the group's first process."""
    rank, world = policy.accelerator.process_index, policy.accelerator.num_processes
    size = recipe.rollout.vllm_tensor_parallel_size
    on_gpu = policy.device.type == "cuda"
    if world % size:
        raise UserError(f"rollout.vllm_tensor_parallel_size ({size}) does not divide the {world} processes")
    engine_sleeps(recipe, on_gpu=on_gpu)
    if rank % size:
        return None
    model = write_model_folder(policy, scratch / "model")
    first = policy.device.index or 0
    devices = list(range(first, first + size)) if on_gpu else []
    output = Path(recipe.training.output_dir)
    log = (output if output.is_dir() else scratch) / f"vllm_rank{rank}.log"
    arguments = engine_arguments(recipe, on_gpu=on_gpu)
    if on_gpu:
        torch.cuda.empty_cache()  # an engine measures what is free while it starts
    python = recipe.rollout.vllm_python
    return EngineProcess(model, arguments, python, devices, log=log, scratch=scratch, private=private)


def write_model_folder(policy: Policy, folder: Path) -> Path:
    """Write config and tokenizer, which the engine is built from. Its weights come with the first sync."""
    config = policy.causal_lm.config
    config.architectures = config.architectures or [type(policy.causal_lm).__name__]
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def engine_arguments(recipe: Recipe, *, on_gpu: bool) -> list[str]:
    """`vllm serve`'s arguments for a colocated engine; ``rollout.vllm_args`` come last and win."""
    rollout = recipe.rollout
    arguments = [
        "--load-format=dummy",
        f"--dtype={rollout.vllm_dtype or recipe.model.dtype}",
        f"--max-model-len={rollout.vllm_max_model_length or recipe.longest_sequence()}",
        f"--gpu-memory-utilization={rollout.vllm_gpu_memory_utilization}",
        f"--tensor-parallel-size={rollout.vllm_tensor_parallel_size}",
    ]
    if recipe.model.trust_remote_code:
        arguments.append("--trust-remote-code")
    if recipe.model.lora is not None and recipe.sends_adapters():
        rank = next((r for r in LORA_RANKS if r >= recipe.model.lora.r), recipe.model.lora.r)
        arguments += ["--enable-lora", f"--max-loras={adapters_held(rollout)}", f"--max-lora-rank={rank}"]
    if not on_gpu:
        arguments.append("--enforce-eager")  # compiling for a CPU takes longer than a small run
    elif rollout.vllm_weight_transfer in ("auto", "ipc"):
        arguments.append('--weight-transfer-config={"backend": "ipc"}')
    if engine_sleeps(recipe, on_gpu=on_gpu):
        arguments.append("--enable-sleep-mode")
    return [*arguments, *rollout.vllm_args]


def adapters_held(rollout: RolloutConfig) -> int:
    """How many adapters a server holds: the newest, and those that completions in flight may have been asked of."""
    return max(rollout.max_staleness, 1) + 1


def _only_grpo(scratch: Path) -> Path:
    """A folder that holds grpo alone: the engine must not find the trainer's other packages."""
    folder = scratch / "python"
    folder.mkdir()
    (folder / "grpo").symlink_to(PACKAGE)
    return folder


def _environment(devices: list[int], packages: Path) -> dict[str, str]:
    """This process's variables for the engine: without those of its launch, with its devices and threads."""
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    variables = {
        name: value for name, value in os.environ.items() if name not in launch and not name.startswith("TORCHELASTIC")
    }
    variables["PYTHONPATH"] = os.pathsep.join([str(packages), *filter(None, [variables.get("PYTHONPATH")])])
    if devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(names[device] for device in devices)
    else:
        # vLLM would keep one core for its server and bind itself to the others. Here trainer and engine take turns.
        variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        variables["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return variables
