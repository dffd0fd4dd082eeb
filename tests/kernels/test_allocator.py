"""The allocator of CPU tensors, in a process of its own: it is for the whole process and to its end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="no compiler")

BEGIN = """
import os, random, sys, threading
from pathlib import Path
import torch
from grpo.kernels.memory import install
MB = 1 << 20

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = torch.arange(100_000)
allocator = install()
assert allocator is not None and allocator is install()
"""


def run(body: str) -> str:
    done = subprocess.run([sys.executable, "-c", BEGIN + body], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_blocks_do_not_overlap_and_keep_what_is_written() -> None:
    """Ten thousand made and freed in a random order, each full of its own number; and one from before it was there."""
    run("""
draw, held = random.Random(0), {}
for i in range(10_000):
    if held and draw.random() < 0.5:
        at = draw.choice(list(held))
        x = held.pop(at)
        assert (x == at % 251).all(), at
    else:
        size = int(2 ** draw.uniform(0, 21))
        held[i] = torch.full((size,), i % 251, dtype=torch.uint8)
        assert held[i].data_ptr() % 64 == 0
assert all((x == at % 251).all() for at, x in held.items())
large = [x.numel() for x in held.values() if x.numel() >= 64 << 10]
assert sum(large) <= allocator.bytes_used() <= sum(large) + 4096 * len(large)
held.clear(); x = None
assert allocator.bytes_used() == 0
assert torch.equal(before, torch.arange(100_000))
""")


@pytest.mark.slow
def test_it_holds_little_more_than_is_used() -> None:
    """What a model's layers do: some blocks are kept, those beside them freed, the next ones are a little larger."""
    said = run("""
kept, start = [], resident()
for round in range(6):
    kept, passing = kept[len(kept) // 2 :], []
    for layer in range(60):
        kept.append(torch.ones(400_000 + 9_000 * round))
        passing.append(torch.ones(500_000 + 11_000 * round))
        passing = passing[-2:]
used = sum(x.nbytes for x in kept)
print((resident() - start) / used)
""")
    assert float(said) < 1.15


@pytest.mark.slow
def test_freed_neighbours_are_one_block_again() -> None:
    run("""
parts = [torch.empty(MB, dtype=torch.uint8) for _ in range(16)]
first, free = min(x.data_ptr() for x in parts), allocator.bytes_free()
random.Random(1).shuffle(parts)
parts.clear()
assert allocator.bytes_free() == free + 16 * MB
assert torch.empty(16 * MB, dtype=torch.uint8).data_ptr() == first
""")


@pytest.mark.slow
def test_trim_gives_back_all_that_is_free() -> None:
    run("""
start = resident()
kept, x = torch.ones(MB // 4), torch.ones(256 * MB // 4)
assert resident() - start > 250 * MB
del x
allocator.trim()
assert resident() - start < 30 * MB and allocator.bytes_free() == 0
assert (kept == 1).all() and (torch.ones(MB) == 1).all()
""")


@pytest.mark.slow
def test_threads() -> None:
    run("""
def work(number):
    draw = random.Random(number)
    for _ in range(2_000):
        x = torch.full((draw.randrange(60_000, 200_000),), number, dtype=torch.uint8)
        wrong.extend([number] if not (x == number).all() else [])

torch.set_num_threads(1)
wrong = []
threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not wrong and allocator.bytes_used() == 0
""")


@pytest.mark.slow
def test_a_forked_process_goes_on_with_it() -> None:
    run("""
def churn():
    while not stop:
        torch.empty(100_000, dtype=torch.uint8)

stop, kept = [], torch.full((MB,), 7, dtype=torch.uint8)
thread = threading.Thread(target=churn); thread.start()
for _ in range(50):
    if (pid := os.fork()) == 0:
        os._exit(0 if (torch.empty(MB, dtype=torch.uint8).fill_(3) == 3).all() and (kept == 7).all() else 1)
    assert os.waitpid(pid, 0)[1] == 0
stop.append(True); thread.join()
""")


@pytest.mark.slow
def test_more_than_there_is_is_torchs_own_error() -> None:
    run("""
try:
    torch.empty(1 << 60, dtype=torch.uint8)
except RuntimeError as error:
    assert "can't allocate memory" in str(error), error
else:
    raise AssertionError
assert (torch.ones(MB) == 1).all()
""")


@pytest.mark.slow
def test_onednn_which_asks_for_bare_pointers() -> None:
    """A product in bfloat16 takes its scratch memory so; and one larger than a page, one smaller."""
    run("""
for n in (8, 300, 2000):
    x, weight = torch.randn(n, 256), torch.randn(512, 256)
    found = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16())
    expected = x.bfloat16().float() @ weight.bfloat16().float().T
    assert torch.allclose(found.float(), expected, rtol=1e-2, atol=1e-1)
y = torch.nn.functional.conv2d(torch.randn(2, 8, 64, 64), torch.randn(16, 8, 3, 3))
assert y.isfinite().all()
del x, weight, found, expected, y
""")


@pytest.mark.slow
def test_the_profiler_sees_its_blocks() -> None:
    run("""
with torch.profiler.profile(profile_memory=True) as profile:
    x = torch.empty(3 * MB, dtype=torch.uint8)
assert max(e.self_cpu_memory_usage for e in profile.key_averages()) == 3 * MB
""")


@pytest.mark.slow
def test_without_a_compiler_memory_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "none")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import logging, torch; logging.basicConfig(level=logging.INFO)\n"
            "from grpo.kernels import memory\n"
            "assert memory.install() is None\nmemory.trim()\nassert (torch.ones(1 << 20) == 1).all()",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("there is no C++ compiler here (none)") == 1
