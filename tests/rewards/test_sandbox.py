"""The sandbox: every attack has its verdict, as whoever runs the tests and as nobody, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rewards.sandbox import Ended, Limits, Sandbox, SandboxUnavailable, kernel, probed_sandbox, values
from rewards.sandbox.pool import LEVELS
from rewards.sandbox.probe import attacked
from rewards.sandbox.program import Request, call_line
from tests.rewards import attacks

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def works(level: str) -> bool:
    try:
        Sandbox(1, level).close()
    except SandboxUnavailable:
        return False
    return True


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    if not works(request.param):
        pytest.skip(f"{request.param} does not work on this machine")
    return request.param


def test_a_level_works_here() -> None:
    with probed_sandbox(1) as sandbox:
        assert sandbox.level in LEVELS


def descendants(of: int | None = None) -> set[int]:
    """Processes below this one, or below another."""
    below: set[int] = {of or os.getpid()}
    found: set[int] = set()
    rows = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, row.split()) for row in rows.splitlines())
    grew = True
    while grew:
        new = {pid for pid, parent in parents.items() if parent in below} - below
        grew = bool(new)
        below |= new
        found |= new
    return {pid for pid in found if Path(f"/proc/{pid}/cmdline").exists() and b"ps\0-eo" not in _command(pid)}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b"ps\0-eo"


def left_behind() -> set[str]:
    """Files and memory that an attack would leave. Tests that run beside this one make folders of a vLLM backend."""
    memory = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    names = {f"/dev/shm/{name}" for name in memory if not name.startswith("grpo-vllm-")}
    names |= {f"/tmp/{name}" for name in os.listdir("/tmp") if "attack" in name or "probe" in name}
    sysv = Path("/proc/sysvipc/shm")
    return names | (set(sysv.read_text().splitlines()[1:]) if sysv.exists() else set())


def run_attacks(level: str, *, as_nobody: bool = False) -> dict:
    with tempfile.TemporaryDirectory() as stage:
        script = [str(HERE / "run_as_nobody.py"), level, stage] if as_nobody else [str(HERE / "attacks.py"), level]
        done = subprocess.run(
            [sys.executable, *script],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_attacks(level: str) -> None:
    processes, things = descendants(), left_behind()
    found = run_attacks(level)
    assert found["bad"] == []
    assert found["longest"] < attacks.SECONDS + 0.5, "wall time is to stay within half a second of the limit"
    assert descendants() <= processes
    assert left_behind() <= things


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the test above ran as an ordinary user")
def test_attacks_as_nobody(level: str) -> None:
    things = left_behind()
    found = run_attacks(level, as_nobody=True)
    assert (found["uid"], found["bad"]) == (65534, [])
    assert left_behind() <= things


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox():
    with probed_sandbox(1) as sandbox:
        yield sandbox


def call(sandbox: Sandbox, source: str, *arguments, limits: Limits | None = None) -> object:
    with sandbox.run(Request("calls", source), limits or Limits()) as run:
        run.send((call_line("f", *arguments) + "\n").encode())
        run.finish_sending()
        loaded, answer = run.rest().splitlines()
    assert loaded == b"loaded"
    what, _, value = answer.partition(b" ")
    assert what == b"value", answer
    return values.decode(value)


def test_large_input_and_output_pass_each_other(sandbox: Sandbox) -> None:
    big = ["x" * 1000] * 1000
    limits = Limits(max_output=1 << 22)
    assert call(sandbox, "def f(x): return x", big, limits=limits) == big


def test_a_script_reads_large_input(sandbox: Sandbox) -> None:
    source = "import sys\nprint(len(sys.stdin.read()))"
    with sandbox.run(Request("script", source, "é" * 1_000_000), Limits()) as run:
        assert run.rest() == b"1000000\n"
    assert (run.ended, run.status) == (Ended.EXITED, 0)


def test_every_run_starts_afresh(sandbox: Sandbox) -> None:
    source = "import builtins, random\ndef f():\n    old = getattr(builtins, 'mark', 0)\n    builtins.mark = 1\n"
    source += "    return [old, random.random(), hash('a')]"
    first, second = call(sandbox, source), call(sandbox, source)
    assert first == second
    assert first[0] == 0


def test_a_killed_zygote_is_replaced(sandbox: Sandbox) -> None:
    for pid in sandbox.pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert call(sandbox, "def f(): return 1") == 1


def test_a_zygote_killed_under_a_run_says_so(sandbox: Sandbox) -> None:
    with sandbox.run(Request("calls", "while True: pass"), Limits(seconds=10)) as run:
        os.kill(sandbox.pids[0], signal.SIGKILL)
        assert run.line() is None
    assert run.ended is Ended.LOST
    assert call(sandbox, "def f(): return 1") == 1


def test_nothing_outlives_a_killed_owner(tmp_path: Path) -> None:
    owner = tmp_path / "owner.py"
    owner.write_text(
        "import sys, time\nfrom rewards.sandbox import Limits, probed_sandbox\n"
        "from rewards.sandbox.program import Request\nsandbox = probed_sandbox(2)\n"
        "with sandbox.run(Request('calls', 'while True: pass'), Limits(100)):\n"
        "    print(*sandbox.pids, flush=True)\n    time.sleep(100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, owner], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        below = descendants(process.pid)
        assert below >= set(pids)
        process.kill()
    deadline = time.monotonic() + 5
    while (alive := {pid for pid in below if _running(pid)}) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_arguments_keep_their_order(sandbox: Sandbox) -> None:
    assert call(sandbox, "def f(x): return list(x)", {"b": 1, "a": 2}) == ["b", "a"]


# --- levels ----------------------------------------------------------------------------------------------------------


def test_the_probe_finds_an_open_door() -> None:
    with Sandbox(1, "unsafe") as open_door:
        assert attacked(open_door) == ["start a process", "use the network", "write a file", "read a secret"]


def test_no_level_is_a_refusal_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.sandbox.probe.LEVELS", ("no_such_level",))
    with pytest.raises(SandboxUnavailable, match="bubblewrap; `allow_unsafe: true`"):
        probed_sandbox(1)
    with probed_sandbox(1, allow_unsafe=True) as unconfined:
        assert unconfined.level == "unsafe"


def test_the_filter_of_both_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        instructions = len(kernel.seccomp_program()) // 8
        assert 100 < instructions < 4096
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(KeyError):
        kernel.seccomp_program()


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -(2**53), 10**5000, 1.5, float("inf"), "", "é\0", b"\xff", 1 + 2j),
        *([], [1, [2.0, "x"]], (1, (2,)), {1: "a", (1, 2): [None]}, {1, 2}, frozenset({"a"})),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_travel_with_their_types(value: object) -> None:
    arrived = values.decode(values.encode(value))
    assert (arrived, type(arrived)) == (value, type(value))
    assert values.encode(arrived) == values.encode(value)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *((1, True), (1, 1.0), (0, False), ([1], (1,)), ({1: 2}, {True: 2}), ({1}, {1.0}), ("1", 1), ("1", b"1")),
        *(([1, 2], [1]), ({}, None), ({(1,)}, {(True,)}), ({(1, (2.0,)): 0}, {(1, (2,)): 0}), ({frozenset([1])}, {1})),
    ],
)
def test_values_differ_in_type_or_value(a: object, b: object) -> None:
    assert values.encode(a) != values.encode(b)


@pytest.mark.parametrize(
    ("a", "b"), [({1: 2, 3: 4}, {3: 4, 1: 2}), ({5, 1, 3}, {3, 5, 1}), (0.0, -0.0), ([{"b", "a"}], [{"a", "b"}])]
)
def test_equal_values_are_written_alike(a: object, b: object) -> None:
    assert values.encode(a) == values.encode(b)


def test_what_is_not_plain_equals_nothing() -> None:
    class Sly(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    for value in (Sly(2), [Sly(2)], object(), lambda: 0):
        assert "foreign" in values.encode(value)
        arrived, again = values.decode(values.encode(value)), values.decode(values.encode(value))
        assert arrived != again
        assert arrived not in (2, [2])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        "[",
        '{"int": 5}',
        '{"set": [[1]]}',
        '{"a": 1, "b": 2}',
        '{"dict": [[1]]}',
        "[" * 5000,
        '{"complex": [' + "9" * 400 + ", 1]}",
        "{'a'}",
        '{"x": 1}',
    ],
)
def test_nonsense_is_malformed(line: str) -> None:
    with pytest.raises(values.Malformed):
        values.decode(line)
