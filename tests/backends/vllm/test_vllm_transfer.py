"""Weights in a file that servers read, the folder it lies in, and which way is chosen. A fake pool awaits in place."""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from grpo.backends.vllm import scratch, serve, transfer
from grpo.backends.vllm.api import Server, ServerGone, WeightSource, cast, why_no_nccl
from grpo.backends.vllm.scratch import make_scratch
from grpo.backends.vllm.transfer import (
    HttpSender,
    IpcSender,
    NcclSender,
    PathSender,
    address_towards,
    choose_way,
    make_sender,
    on_each,
)
from grpo.errors import BackendFailed, RunError, UserError
from tests.conftest import make_policy, make_recipe
from tests.launching import ROOT

F32, BF16 = torch.float32, torch.bfloat16


class FakePool:
    """In place of the pool's thread."""

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(work)


class FakeServer:
    """In place of a server that loads weights from a folder: keeps what it found there, or raises ``error``."""

    def __init__(self, url: str = "http://a:1", error: Exception | None = None):
        self.url, self.error = url, error
        self.loaded: dict[str, torch.Tensor] = {}
        self.files: list[str] = []

    async def load(self, folder: str, timeout: float) -> None:
        self.files = os.listdir(folder)
        self.loaded = {name: t.clone() for name, t in load_file(Path(folder) / "model.safetensors").items()}
        if self.error:
            raise self.error


def send(folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype, *servers: FakeServer) -> dict[str, str]:
    return PathSender(FakePool(), folder, 5.0).send(list(servers), state, dtype)  # type: ignore[arg-type]


def state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(5, 7), "b.weight": torch.randn(3)}


# --- a file ---


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_servers_find_the_weights_in_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    sent, servers = state(), [FakeServer(), FakeServer("http://b:1")]
    assert send(tmp_path, sent, dtype, *servers) == {}
    for server in servers:
        assert server.files == ["model.safetensors"]
        assert server.loaded.keys() == sent.keys()
        for name, tensor in cast(sent, dtype):
            assert torch.equal(server.loaded[name], tensor)
            assert server.loaded[name].dtype is dtype
    assert os.listdir(tmp_path) == []


def test_what_the_model_keeps_in_float32_is_sent_so(tmp_path: Path) -> None:
    server, sent = FakeServer(), {"a.weight": torch.randn(5, 7).to(BF16), "a.router_bias": torch.randn(3)}
    send(tmp_path, sent, BF16, server)
    assert torch.equal(server.loaded["a.router_bias"], sent["a.router_bias"])
    assert server.loaded["a.weight"].dtype is BF16
    assert {tensor.dtype for _, tensor in cast(sent, F32)} == {F32}


def test_weights_are_cast_one_at_a_time() -> None:
    sent = state()
    rows = cast(sent, BF16)
    name, tensor = next(rows)
    assert (name, tensor.dtype) == ("a.weight", BF16)
    assert cast({"x": nn.Parameter(torch.ones(2))}, F32).__next__()[1].requires_grad is False


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_tied_head_is_sent_once_under_the_name_that_comes_first(tmp_path: Path, dtype: torch.dtype) -> None:
    embedding = torch.randn(9, 4)
    server = FakeServer()
    send(tmp_path, {"embed.weight": embedding, "norm": torch.ones(4), "lm_head.weight": embedding}, dtype, server)
    assert set(server.loaded) == {"embed.weight", "norm"}


def test_the_tiny_models_tied_head_is_sent_once(tiny_model: Path, tmp_path: Path) -> None:
    policy = make_policy(tiny_model)
    server = FakeServer()
    send(tmp_path, policy.full_state(), F32, server)
    assert set(policy.full_state()) - set(server.loaded) == {"lm_head.weight"}


def test_equal_weights_that_are_not_one_are_both_sent(tmp_path: Path) -> None:
    server = FakeServer()
    send(tmp_path, {"a": torch.ones(3), "b": torch.ones(3)}, F32, server)
    assert set(server.loaded) == {"a", "b"}


def test_weights_in_any_layout_can_be_sent(tmp_path: Path) -> None:
    sent = {"transposed": torch.randn(4, 6).T, "columns": torch.randn(4, 6)[:, ::2], "row": torch.randn(4, 6)[2]}
    server = FakeServer()
    send(tmp_path, sent, F32, server)
    assert all(torch.equal(server.loaded[name], tensor) for name, tensor in sent.items())


def test_the_file_is_removed_even_where_no_server_takes_it(tmp_path: Path) -> None:
    gone, fine = FakeServer(error=ServerGone("no answer to POST /collective_rpc within 5 s")), FakeServer("http://b:1")
    assert send(tmp_path, state(), F32, gone, fine) == {gone.url: "no answer to POST /collective_rpc within 5 s"}
    assert fine.loaded
    assert os.listdir(tmp_path) == []
    with pytest.raises(RunError, match="refused"):
        send(tmp_path, state(), F32, FakeServer(error=RunError("refused")))
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError):
        send(tmp_path, state(), F32, FakeServer(error=KeyError("a bug")))
    assert os.listdir(tmp_path) == []


def test_without_servers_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "not made"
    assert send(folder, state(), F32) == {}
    assert not folder.exists()


def test_what_a_kill_left_in_the_folder_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_text("half a file")
    server, sent = FakeServer(), state()
    send(tmp_path, sent, F32, server)
    assert torch.equal(server.loaded["a.weight"], sent["a.weight"])


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may be larger than 50 kB: how a full disk looks."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_full_disk_is_an_error_that_says_what_to_set(tmp_path: Path, small_files: None) -> None:
    with pytest.raises(BackendFailed) as failed:
        send(tmp_path, {"large": torch.ones(50_000)}, F32, FakeServer())
    text = str(failed.value)
    assert text.startswith(f"cannot write the weights for vllm (0.00 GB) in {tmp_path}/weights, which has ")
    assert "Set rollout.vllm_sync_dir to a folder with room that the servers see too" in text
    assert os.listdir(tmp_path) == []


# --- all servers at once ---


def test_what_is_done_on_each_is_done_at_once_and_names_those_that_are_gone() -> None:
    servers: Any = [FakeServer(f"http://{letter}:1") for letter in "abc"]
    together = asyncio.Barrier(3) if hasattr(asyncio, "Barrier") else None

    async def work(server: Any) -> None:
        if together is not None:
            await asyncio.wait_for(together.wait(), 5)
        if server is servers[1]:
            raise ServerGone("broke off")

    assert asyncio.run(on_each(servers, work)) == {"http://b:1": "broke off"}
    assert asyncio.run(on_each([], work)) == {}


def test_a_refusal_counts_more_than_a_server_that_is_gone() -> None:
    servers: Any = [FakeServer(f"http://{letter}:1") for letter in "abc"]
    done = []

    async def work(server: Any) -> None:
        if server is servers[0]:
            raise ServerGone("broke off")
        if server is servers[1]:
            raise RunError("refused")
        await asyncio.sleep(0.02)
        done.append(server)

    with pytest.raises(RunError, match="refused"):
        asyncio.run(on_each(servers, work))
    assert done == [servers[2]], "what was begun on the others is finished"


# --- which way ---


def choose(device: str, **rollout: Any) -> Any:
    policy = SimpleNamespace(device=torch.device(device), accelerator=SimpleNamespace(process_index=3, num_processes=4))
    recipe = make_recipe(Path("tiny"), rollout={"backend": "vllm"} | rollout)
    way = choose_way(recipe, on_gpu=device == "cuda")
    return make_sender(way, recipe, policy, FakePool(), Path("/scratch"))  # type: ignore[arg-type]


SERVER = {"vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:1"}
ELSEWHERE = SERVER | {"vllm_server_base_url": "http://192.0.2.1:1"}


@pytest.mark.parametrize(
    ("device", "rollout", "kind"),
    [
        ("cpu", {}, PathSender),
        ("cpu", SERVER, PathSender),
        ("cpu", ELSEWHERE, HttpSender),
        ("cpu", SERVER | {"vllm_weight_transfer": "http"}, HttpSender),
        ("cpu", ELSEWHERE | {"vllm_weight_transfer": "path"}, PathSender),
        ("cpu", {"vllm_weight_transfer": "path"}, PathSender),
        ("cuda", {}, IpcSender),
        ("cuda", SERVER, NcclSender),
        ("cuda", {"vllm_weight_transfer": "ipc"}, IpcSender),
        ("cuda", {"vllm_weight_transfer": "path"}, PathSender),
        ("cuda", SERVER | {"vllm_weight_transfer": "path"}, PathSender),
        ("cuda", SERVER | {"vllm_weight_transfer": "nccl"}, NcclSender),
    ],
)
def test_the_way_is_that_of_the_recipe_or_fits_device_and_mode(
    device: str, rollout: dict[str, Any], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "why_no_nccl", lambda: None)
    sender = choose(device, vllm_sync_timeout=7.0, **rollout)
    assert type(sender) is kind
    assert sender.timeout == 7.0


def test_senders_know_where_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "why_no_nccl", lambda: None)
    assert choose("cpu").folder == Path("/scratch")
    sender = choose("cuda", **SERVER, vllm_group_port=6000, vllm_group_host="10.0.0.1")
    assert (sender.first_port, sender.host) == (6000, "10.0.0.1")


def test_without_a_vllm_beside_the_trainer_files_are_sent_and_nccl_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """As it is here: the trainer's environment has no vLLM."""
    with caplog.at_level("INFO", "grpo"):
        assert type(choose("cuda", **SERVER)) is PathSender
        assert type(choose("cuda", **ELSEWHERE)) is HttpSender
    assert [record.getMessage() for record in caplog.records] == [
        f"rollout.vllm_weight_transfer: auto is {way} here: vLLM is not installed beside the trainer, and nccl needs it"
        for way in ("path", "http")
    ]
    with pytest.raises(
        UserError, match=r"^rollout\.vllm_weight_transfer: nccl needs the servers' vLLM beside the .*path"
    ):
        choose("cuda", **SERVER, vllm_weight_transfer="nccl")


def test_a_vllm_that_cannot_send_over_nccl_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "installed_version", lambda: "0.31.0")
    assert why_no_nccl() == "vLLM 0.31.0 is installed beside the trainer, and grpo supports vllm>=0.32,<0.34"
    monkeypatch.setattr(serve, "installed_version", lambda: "0.33.0")
    assert why_no_nccl() == "the vLLM beside the trainer (0.33.0) is its CPU build"
    monkeypatch.setattr(serve, "for_cpus", lambda: False)
    assert why_no_nccl() == "vLLM 0.33.0 cannot be imported beside the trainer (No module named 'vllm')"


def test_the_address_is_that_of_the_interface_that_leads_to_the_server() -> None:
    assert address_towards("http://127.0.0.1:8000") == "127.0.0.1"
    assert address_towards("https://localhost") in ("127.0.0.1", "::1")
    with pytest.raises(OSError, match=r"[Nn]ame|[Aa]ddress"):
        address_towards("http://no-such-host.invalid:1")


# --- between GPUs, imitated ---


class RecordingServer:
    """In place of a vLLM server that is given weights over CUDA IPC or NCCL: what it is asked, in order, and vLLM's
    own rule that an update cannot start while another is active (gpu_worker.py of 0.32)."""

    def __init__(self, url: str = "http://127.0.0.1:1"):
        self.url, self.asked, self.active = url, [], False
        self.fails: dict[str, Exception] = {}
        self.updates: list[dict[str, Any]] = []

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if what in self.fails:
            raise self.fails.pop(what)

    async def settings(self) -> dict[str, Any]:
        return {"parallel_config": {"tensor_parallel_size": 2}}

    async def init_transfer(self, init_info: dict[str, Any], timeout: float) -> None:
        self._ask("init")

    async def start_update(self, timeout: float) -> None:
        self._ask("start")
        if self.active:
            raise ServerGone("start_weight_update called while a weight update is already active")
        self.active = True

    async def update(self, update_info: dict[str, Any], timeout: float) -> None:
        self._ask("update")
        self.updates.append(update_info)

    async def finish_update(self, timeout: float) -> None:
        self._ask("finish")
        if not self.active:
            raise ServerGone("finish_weight_update called without a matching start_weight_update")
        self.active = False

    abandon_update = Server.abandon_update


@pytest.fixture
def ipc(monkeypatch: pytest.MonkeyPatch) -> IpcSender:
    """Of the only process of its group, in chunks of a tensor; a handle is the tensor's sum."""
    monkeypatch.setattr(transfer, "handle_of", lambda tensor: {"GPU-0": float(tensor.sum())})
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1)
    return IpcSender(FakePool(), lambda value: [value], 5.0)  # type: ignore[arg-type]


def test_handles_are_sent_chunk_by_chunk_between_start_and_finish(ipc: IpcSender) -> None:
    server: Any = RecordingServer()
    assert ipc.send([server], {"a": torch.ones(2, 3), "b": torch.ones(4)}, BF16) == {}
    assert server.asked == ["init", "start", "update", "update", "finish"]
    handles = [pickle.loads(base64.b64decode(info.pop("ipc_handles_pickled"))) for info in server.updates]
    assert handles == [[{"GPU-0": 6.0}], [{"GPU-0": 4.0}]]
    assert server.updates[0] == {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}


@pytest.mark.parametrize("what", ["start", "update", "finish"])
def test_after_a_transfer_that_broke_off_the_next_one_ends_it_first(ipc: IpcSender, what: str) -> None:
    broken: Any = RecordingServer()
    fine: Any = RecordingServer("http://127.0.0.1:2")
    broken.fails[what] = ServerGone("it broke off")
    assert ipc.send([broken, fine], state(), F32) == {broken.url: "it broke off"}
    assert fine.asked == ["init", "start", "update", "update", "finish"]
    broken.asked.clear(), fine.asked.clear()
    assert ipc.send([broken, fine], state(), F32) == {}
    assert broken.asked == ["start", "finish", "init", "start", "update", "update", "finish"]
    assert fine.asked == ["init", "start", "update", "update", "finish"]


def test_a_refusal_is_raised_after_the_last_exchange_of_handles(
    monkeypatch: pytest.MonkeyPatch, ipc: IpcSender
) -> None:
    """Another process of the group would wait for the exchanges that are left."""
    exchanged: list[Any] = []
    ipc.gather = lambda value: exchanged.append(value) or [value]  # type: ignore[func-returns-value]
    server: Any = RecordingServer()
    server.fails["init"] = BackendFailed("refused")
    with pytest.raises(BackendFailed, match="refused"):
        ipc.send([server], state(), F32)
    assert len(exchanged) == 4
    assert server.asked == ["init"]


class RecordedEnd:
    """NOT vLLM's sending end: like it, it starts, sends and finishes an update on its server, and blocks meanwhile."""

    def __init__(self, server: RecordingServer, sends: Callable[[], None]):
        self.server, self.sends, self.source = server, sends, None

    def send_weights(self) -> None:
        asyncio.run(self.server.start_update(5.0))
        self.sends()
        assert self.source is not None
        self.server.updates.append(dict(iter(self.source)))
        asyncio.run(self.server.finish_update(5.0))


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[NcclSender, list[Any], list[Any]]]:
    """A sender for two servers, those, and the arguments with which sending ends were made."""

    def make(sends: Callable[[RecordingServer], None]) -> tuple[NcclSender, list[Any], list[Any]]:
        servers: list[Any] = [RecordingServer(f"http://127.0.0.1:{n}") for n in (1, 2)]
        by_url = {server.url: server for server in servers}
        made: list[Any] = []

        def end(*arguments: Any) -> RecordedEnd:
            made.append(arguments)
            return RecordedEnd(by_url[arguments[0]], lambda: sends(by_url[arguments[0]]))

        monkeypatch.setattr(transfer, "nccl_sending_end", end)
        pool = FakePool()
        pool.servers = servers  # type: ignore[attr-defined]
        return NcclSender(pool, None, 6000, 2.0, torch.device("cpu")), servers, made  # type: ignore[arg-type]

    return make


def test_servers_are_sent_to_at_once_each_by_an_end_of_its_own(nccl: Any) -> None:
    together = threading.Barrier(2, timeout=5)
    sender, servers, made = nccl(lambda server: together.wait())
    sent = state()
    assert sender.send(servers, sent, F32) == {}
    assert all(torch.equal(server.updates[0]["a.weight"], sent["a.weight"]) for server in servers)
    assert sorted(made) == [
        ("http://127.0.0.1:1", "127.0.0.1", 6000, 2, 2.0),
        ("http://127.0.0.1:2", "127.0.0.1", 6001, 2, 2.0),
    ]
    assert sender.send(servers, sent, F32) == {}
    assert len(made) == 2, "an end is used again"
    assert sender.send([], sent, F32) == {}


def test_a_server_that_breaks_off_gets_a_new_end_after_the_old_update_was_ended(nccl: Any) -> None:
    broken: list[Any] = []

    def sends(server: RecordingServer) -> None:
        if broken == [server]:
            raise RuntimeError("NCCL error: remote process exited")

    sender, servers, made = nccl(sends)
    assert sender.send(servers, state(), F32) == {}
    broken.append(servers[1])
    why = "NCCL weight transfer: NCCL error: remote process exited"
    assert sender.send(servers, state(), F32) == {servers[1].url: why}
    assert servers[1].active
    broken.clear()
    servers[1].asked.clear()
    assert sender.send(servers, state(), F32) == {}
    assert servers[1].asked == ["start", "finish", "start", "finish"]
    assert [arguments[0] for arguments in made].count(servers[1].url) == 2
    assert [arguments[0] for arguments in made].count(servers[0].url) == 1


def test_a_server_that_hangs_holds_up_nobody_for_longer_than_its_seconds(nccl: Any) -> None:
    let_go = threading.Event()
    sender, servers, _ = nccl(lambda server: let_go.wait(10) if server is servers[0] else None)
    sender.timeout = 0.3
    assert sender.send(servers, state(), F32) == {servers[0].url: "NCCL weight transfer: no end within 0.3 s"}
    let_go.set()


def test_a_bug_is_no_lost_server(nccl: Any) -> None:
    def sends(server: RecordingServer) -> None:
        raise KeyError("a bug")

    sender, servers, _ = nccl(sends)
    with pytest.raises(KeyError):
        sender.send(servers, state(), F32)


def test_a_state_is_declared_and_iterated_over_as_both_versions_of_vllm_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.32 calls ``metadata()`` and iterates, 0.33 reads ``metadata`` and calls ``iter_full()``."""
    module = ModuleType("vllm.distributed.weight_transfer.base")
    module.ParamMeta = lambda *fields: fields  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = WeightSource(state(), BF16)
    assert source.metadata() == source.metadata == [("a.weight", BF16, (5, 7)), ("b.weight", BF16, (3,))]
    assert source.implements_iter_full()
    for rows in (iter(source), source.iter_full()):
        assert [(name, tensor.dtype) for name, tensor in rows] == [("a.weight", BF16), ("b.weight", BF16)]


@pytest.mark.parametrize(
    ("way", "rollout"), [("ipc", {"vllm_weight_transfer": "ipc"}), ("nccl", SERVER | {"vllm_weight_transfer": "nccl"})]
)
def test_ways_between_gpus_are_refused_without(way: str, rollout: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^rollout\.vllm_weight_transfer: {way} needs GPUs; path works without$"):
        choose("cpu", **rollout)


@pytest.mark.parametrize(("size", "group"), [(1, [3]), (2, [2, 3]), (4, [0, 1, 2, 3])])
def test_handles_come_from_the_engines_own_group(size: int, group: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "gather_object", lambda value: [0, 1, 2, 3])
    assert choose("cuda", vllm_tensor_parallel_size=size).gather(3) == group


def test_weights_are_shared_in_chunks_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 100)
    sent = {str(i): torch.zeros(n) for i, n in enumerate((10, 20, 30, 1, 1))}
    assert [[name for name, _ in chunk] for chunk in transfer._chunks(sent, F32)] == [["0", "1"], ["2"], ["3", "4"]]


# --- the folder ---


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for shared memory."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(scratch, "SHARED_MEMORY", folder)
    return folder


@pytest.fixture
def leave(memory: Path) -> Iterator[Callable[..., tuple[Path, int]]]:
    """Makes a folder in another process, which stays alive (or is killed); the folder and the process's id."""
    made: list[subprocess.Popen[str]] = []

    def leave(*, killed: bool) -> tuple[Path, int]:
        scene = f"""
import sys, time
from pathlib import Path
from grpo.backends.vllm import scratch
scratch.SHARED_MEMORY = Path({str(memory)!r})
made = scratch.make_scratch(None)
(Path(made.name) / "weights").mkdir()
print(made.name, flush=True)
time.sleep(60)
"""
        made.append(
            subprocess.Popen(
                [sys.executable, "-c", scene],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert made[-1].stdout is not None
        folder = Path(made[-1].stdout.readline().strip())
        if killed:
            made[-1].kill()
            made[-1].wait()
        return folder, made[-1].pid

    yield leave
    for process in made:
        process.kill()
        process.communicate()


def test_what_a_killed_process_left_is_swept_and_what_a_live_one_holds_stays(
    memory: Path, leave: Callable[..., tuple[Path, int]]
) -> None:
    live, _ = leave(killed=False)
    dead, _ = leave(killed=True)
    assert dead.exists()
    mine = make_scratch(None)
    assert {path.name for path in memory.iterdir()} == {live.name, Path(mine.name).name}
    assert (live / "weights").exists()
    mine.cleanup()
    assert list(memory.iterdir()) == [live]


def test_a_folder_of_a_process_that_only_another_container_sees_stays(
    memory: Path, leave: Callable[..., tuple[Path, int]]
) -> None:
    """Containers may share /dev/shm and number their processes each for itself."""
    live, pid = leave(killed=False)
    unseen = live.rename(live.with_name(live.name.replace(str(pid), str(dead_pid()))))
    make_scratch(None).cleanup()
    assert list(memory.iterdir()) == [unseen]


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_other_programs_folders_are_left_alone(memory: Path) -> None:
    others = [memory / "other", memory / f"{scratch.PREFIX}notes", memory / f"other-{dead_pid()}-x"]
    for folder in others:
        folder.mkdir()
    make_scratch(None).cleanup()
    assert set(memory.iterdir()) == set(others)


def test_a_folder_of_the_recipes_own_is_used_and_not_swept(memory: Path, tmp_path: Path) -> None:
    """It may be on a disk that other machines use too, whose processes nobody here knows."""
    of_another = tmp_path / f"{scratch.PREFIX}{dead_pid()}-x"
    of_another.mkdir()
    made = make_scratch(str(tmp_path))
    assert Path(made.name).parent == tmp_path
    assert Path(made.name).name.startswith(f"{scratch.PREFIX}{os.getpid()}-")
    assert of_another.exists()
    made.cleanup()
    assert not Path(made.name).exists()


def test_a_folder_that_cannot_be_written_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, why in ((tmp_path / "none", "No such file or directory"), (tmp_path / "file", "Not a directory")):
        with pytest.raises(UserError, match=rf"^rollout\.vllm_sync_dir: cannot write in {folder}: {why}$"):
            make_scratch(str(folder))


def test_a_folder_is_gone_with_its_process(memory: Path) -> None:
    made = make_scratch(None)
    shutil.copy(__file__, made.name)
    del made
    assert list(memory.iterdir()) == []
