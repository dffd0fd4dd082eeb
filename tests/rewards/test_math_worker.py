"""The math workers: killed when late, replaced, blamed fairly, gone with their parent, and never executing text."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rewards.math import math_reward, verify
from rewards.math import pool as math_pool
from rewards.math import reward as math_rewards
from rewards.math.pool import Pool, WorkerFailed, WorkerTimeout
from rewards.verdict import Outcome

# Equal, and it takes sympy far longer to see it than anybody waits.
HANGS = ("(\\sin x+\\cos x)^{64}", "\\boxed{(1+\\sin(2x))^{32}}")
SIMILAR = {"gold": "\\sin x", "answer": "\\cos(\\frac{\\pi}{2}-x)"}


@pytest.fixture(autouse=True)
def _fresh_pool():
    math_rewards.stop()
    math_rewards._known.clear()
    math_rewards._gold_of.cache_clear()
    yield
    math_rewards.stop()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_gmpy2_is_not_here():
    """With it, one huge integer operation would hold the interpreter beyond any signal."""
    assert importlib.util.find_spec("gmpy2") is None


def test_numbers_need_no_worker():
    golds = ["42", "\\frac{1}{3}", "2\\sqrt{3}", "x^2-1", "(1,2)", "[3,\\infty)", "Monday", "\\log_2 8", "\\sin 2x"]
    answers = ["41", "0.333", "\\sqrt{12}", "(x-1)(x+1)", "(2,1)", "x \\ge 3", "Tuesday", "3", "2\\sin x"]
    for gold, answer in zip(golds, answers, strict=True):
        verify(gold, f"\\boxed{{{answer}}}")
    assert math_pool._pool is None


@pytest.mark.slow
def test_a_late_worker_is_killed_and_replaced():
    math_rewards.start()
    before = math_pool.current().pids
    assert verify("\\sin 1", "\\boxed{\\cos(\\frac{\\pi}{2}-1)}", timeout=20.0).outcome is Outcome.CORRECT
    started = time.monotonic()
    verdict = verify(*HANGS, timeout=0.5)
    assert (verdict.outcome, verdict.reward) == (Outcome.TIMEOUT, 0.0)
    assert time.monotonic() - started < 5
    assert len(set(before) - set(math_pool.current().pids)) == 1
    assert [alive(pid) for pid in before].count(True) == 1
    assert verify("\\sin 2", "\\boxed{2\\sin(1)\\cos(1)}", timeout=20.0).outcome is Outcome.CORRECT


@pytest.mark.slow
def test_a_timeout_is_not_remembered_and_a_verdict_is():
    close = "\\boxed{\\sin(1)+2^{-999}}"
    verify(*HANGS, timeout=0.2)
    verify("\\sin 1", close, timeout=20.0)
    assert [(gold, verdict.outcome) for (gold, _), verdict in math_rewards._known.items()] == [
        ("\\sin 1", Outcome.WRONG)
    ]
    math_rewards.stop()
    assert verify("\\sin 1", close).outcome is Outcome.WRONG
    assert math_pool._pool is None  # nobody was asked


@pytest.mark.slow
def test_a_gold_answer_that_takes_too_long_scores_nobody(monkeypatch):
    monkeypatch.setattr(math_rewards, "GOLD_TIMEOUT", 0.001)
    assert verify("\\lfloor x \\rfloor + 1", "\\boxed{1}").reward is None


@pytest.mark.slow
def test_memory_is_limited():
    pool = Pool(1)
    try:
        with open(f"/proc/{pool.pids[0]}/limits") as file:
            limits = {line[:26].strip(): line[26:].split()[:2] for line in file}
        assert limits["Max address space"] == [str(2 << 30)] * 2
        assert limits["Max core file size"] == ["0", "0"]
    finally:
        pool.close()


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_request_answered():
    pool = Pool(1)
    try:
        os.kill(pool.pids[0], signal.SIGKILL)  # while idle
        assert pool.ask(SIMILAR, 20.0) == {"right": True}
        pid = pool.pids[0]
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(WorkerTimeout):  # killed once by somebody, given to another one, late there too
            pool.ask({"gold": HANGS[0], "answer": "(1+\\sin(2x))^{32}"}, 1.0)
        assert pool.ask(SIMILAR, 20.0) == {"right": True}
    finally:
        pool.close()


@pytest.mark.slow
def test_a_stopped_worker_is_late_like_any_other():
    pool = Pool(1)
    try:
        os.kill(pool.pids[0], signal.SIGSTOP)
        with pytest.raises(WorkerTimeout):
            pool.ask(SIMILAR, 0.5)
        assert pool.ask(SIMILAR, 20.0) == {"right": True}
    finally:
        pool.close()


def test_many_threads_at_once_and_threads_that_end():
    """Workers outlive the thread that asked for them first."""
    pairs = [("\\sin x", "\\boxed{\\cos(\\frac{\\pi}{2}-x)}"), ("\\ln 2", "\\boxed{\\ln 3}"), ("42", "\\boxed{42}")] * 4
    starter = threading.Thread(target=math_rewards.start)
    starter.start()
    starter.join()
    pids = math_pool.current().pids
    with ThreadPoolExecutor(6) as threads:
        rewards = list(threads.map(lambda pair: verify(*pair, timeout=20.0).reward, pairs))
        lists = list(
            threads.map(
                lambda _: math_reward([""] * 3, [c for _, c in pairs[:3]], [g for g, _ in pairs[:3]], timeout=20.0),
                "abc",
            )
        )
    assert rewards == [1.0, 0.0, 1.0] * 4
    assert lists == [[1.0, 0.0, 1.0]] * 3
    assert math_pool.current().pids == pids


@pytest.mark.slow
def test_start_and_stop_may_be_called_twice():
    math_rewards.start(1)
    pids = math_pool.current().pids
    math_rewards.start(2)
    assert math_pool.current().pids == pids
    assert len(pids) == 1
    math_rewards.stop()
    math_rewards.stop()
    assert wait_until(lambda: not alive(pids[0]))


@pytest.mark.slow
def test_a_pool_that_is_closed_says_so():
    pool = Pool(1)
    pool.close()
    with pytest.raises(WorkerFailed, match="stopped"):
        pool.ask(SIMILAR, 1.0)


def test_a_worker_that_cannot_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(math_pool, "WORKER", "rewards.no_such_worker")
    with pytest.raises(WorkerFailed, match="math-verify"):
        verify("\\sin 1", "\\boxed{\\sin(1)+2^{-999}}")


def test_workers_die_with_a_killed_parent_even_when_busy():
    program = textwrap.dedent(
        f"""
        import threading, time
        from rewards.math import pool as math_pool
        from rewards.math import start, verify
        start(2)
        threading.Thread(target=verify, args={HANGS!r}, kwargs=dict(timeout=60), daemon=True).start()
        time.sleep(0.5)
        print(*math_pool.current().pids, flush=True)
        time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        parent.kill()
    assert wait_until(lambda: not any(map(alive, pids)))


def test_a_fork_does_not_use_its_parents_workers():
    math_rewards.start(1)
    pids = math_pool.current().pids
    child = os.fork()
    if child == 0:
        os._exit(0 if math_pool._pool is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert math_pool.current().pids == pids


PROBE = """
import builtins, os, sys
import sympy, sympy.parsing.sympy_parser as parser
from rewards.math import worker as math_worker

math_worker._same_formula("\\\\sin x", "\\\\cos(\\\\frac{\\\\pi}{2}-x)")
seen = []
MARK = "PAYLOAD"

def watch(event, args):
    if event in ("compile", "exec", "open", "os.system", "subprocess.Popen", "import", "os.exec", "os.posix_spawn"):
        if MARK in repr(args) or event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
            seen.append((event, repr(args)[:200]))

def record(name, original):
    def wrapper(text, *args, **kwargs):
        if isinstance(text, str):
            seen.append((name, text[:200]))
        return original(text, *args, **kwargs)
    return wrapper

sys.addaudithook(watch)
parser.parse_expr = record("parse_expr", parser.parse_expr)  # sympify imports it when it is given text
parser.eval_expr = record("eval_expr", parser.eval_expr)
builtins.eval = record("eval", builtins.eval)
for module in list(sys.modules.values()):  # the names that other modules hold
    for name in ("sympify", "_sympify", "parse_expr", "nsimplify"):
        if getattr(module, "__name__", "").startswith(("sympy", "latex2sympy2", "math_verify", "rewards")):
            if callable(getattr(module, name, None)) and name != "nsimplify":
                setattr(module, name, record(f"{module.__name__}.{name}", getattr(module, name)))

# First that the watch sees something.
sympy.sympify("PAYLOAD + 1")
eval("'PAYLOAD'")
assert {"parse_expr", "eval", "compile"} <= {name for name, _ in seen}, seen
assert any(name.endswith("sympify") for name, _ in seen), seen
seen.clear()

for guarded in (True, False):
    if not guarded:  # the parser alone, as if every guard had failed
        from rewards.math import compare as math_compare
        from rewards.math import expression as math_expression

        math_compare.check_for_worker = math_expression.check_for_worker = lambda text: None
    for payload in sys.stdin.read().split("\\n"):
        print(guarded, payload[:60], math_worker.answer({"gold": "\\\\sin x", "answer": payload}))
        if not guarded:
            try:
                math_worker.same_expression(math_worker.parse("\\\\sin x"), math_worker.parse(payload))
            except Exception as why:
                print("  refused:", type(why).__name__)
assert not seen, seen
print("clean")
"""
PAYLOADS = [
    "__import__('os').system('touch PAYLOAD')",
    "[open('PAYLOAD','w').write('x')]\\pi",
    "\\sin(__import__('os').system('touch PAYLOAD'))",
    "\\operatorname{__import__('os').system('touch PAYLOAD')}(1)",
    "\\operatorname{exec}(open('PAYLOAD','w'))",
    "\\text{__import__('os').system('touch PAYLOAD')}",
    "\\mathrm{open('PAYLOAD','w')}",
    "\\variable{__import__('os').system('touch PAYLOAD')}",
    "x_{__import__('os').system('touch PAYLOAD')}",
    "\\gcd(open('PAYLOAD','w'),2)",
    "\\frac{open('PAYLOAD','w')}{2}",
    "lambda: open('PAYLOAD','w')",
    "().__class__.__bases__[0].__subclasses__() PAYLOAD",
    "\\sqrt{eval(\"open('PAYLOAD','w')\")}",
    "eval(PAYLOAD)",
]


@pytest.mark.slow
def test_no_text_is_ever_evaluated(tmp_path):
    """The payloads go through the worker's own code, with its guards and without, while everything is watched."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input="\n".join(PAYLOADS),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("clean\n")
    assert list(tmp_path.iterdir()) == []
