"""Scoring with real processes: what a reward function may do, and what becomes of the completions beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from grpo.config import RewardConfig, ScoringConfig
from grpo.errors import RunError, UserError
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt, Status

FUNCTIONS = """
import asyncio, os, signal, time

def _each(completions, act):
    return [act(c) if c.startswith("bad") else float(len(c)) for c in completions]

def length(completions, **kwargs):
    return _each(completions, lambda c: 0.0)

def raises(completions, **kwargs):
    return _each(completions, lambda c: {}["no such key"])

def loops(completions, **kwargs):
    def forever(c):
        while True: pass
    return _each(completions, forever)

def power_tower(completions, **kwargs):
    return _each(completions, lambda c: eval("99**98**97"))  # holds the GIL in C

def exits(completions, **kwargs):
    return _each(completions, lambda c: os._exit(0))

def system_exit(completions, **kwargs):
    return _each(completions, lambda c: exit())

def segfault(completions, **kwargs):
    return _each(completions, lambda c: os.kill(os.getpid(), signal.SIGSEGV))

def killed(completions, **kwargs):
    return _each(completions, lambda c: os.kill(os.getpid(), signal.SIGKILL))

def memory(completions, **kwargs):
    return _each(completions, lambda c: len(b"x" * 10**11))

class Rude(BaseException): pass

def rude(completions, **kwargs):
    def be(c): raise Rude("boo")
    return _each(completions, be)

async def awaits(completions, **kwargs):
    await asyncio.sleep(0.3)
    return [float(len(c)) for c in completions]

async def await_forever(completions, **kwargs):
    await asyncio.sleep(1000 if any(c.startswith("bad") for c in completions) else 0.01)
    return [float(len(c)) for c in completions]

async def async_loops(completions, **kwargs):
    await asyncio.sleep(0.01)
    return loops(completions)

async def async_rude(completions, **kwargs):
    await asyncio.sleep(0.01)
    return system_exit(completions)

def too_few(completions, **kwargs): return [1.0]
def nothing(completions, **kwargs): return None
def one_number(completions, **kwargs): return 1.0
def words(completions, **kwargs): return ["good" for c in completions]
def nan(completions, **kwargs): return _each(completions, lambda c: float("nan"))
def infinite(completions, **kwargs): return _each(completions, lambda c: 10**400)
def extra_short(completions, log_extra, **kwargs):
    log_extra("x", [1])
    return [0.0] * len(completions)

def sees(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, log_verdict, status, prefill,
         nums, bonus, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(status) == len(prefill) == len(nums)
    nums[0].clear()  # its own copy
    log_extra("seen", [f"{p}|{c}|{i}|{s}|{f}|{n}" for p, c, i, s, f, n in
                       zip(prompts, completions, completion_ids, status, prefill, nums)])
    log_metric("step_seen", trainer_state.global_step + trainer_state.max_steps)
    log_verdict(["fine"] * len(completions))
    return [bonus] * len(completions)

def plain(completions, target):  # no **kwargs
    return [t / 2 for t in target]

def ints_and_none(completions, **kwargs):
    return [None if c.startswith("bad") else True for c in completions]

def pid(completions, **kwargs):
    return [float(os.getpid())] * len(completions)

def torch_here(completions, **kwargs):
    import sys
    return [float("torch" in sys.modules or "pydantic" in sys.modules)] * len(completions)

def whole(completions, **kwargs):
    loops(completions)
    return [float(len(completions))] * len(completions)
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    file.write_text(FUNCTIONS)
    return file


def group(*texts: str, prompt="p", id=0, columns=None, prefill="") -> Group:
    completions = [Completion([len(text)], [0.0], Status.STOP, text, []) for text in texts]
    return Group(Prompt(id, prompt, str(prompt), [1], prefill, columns or {}), completions)


def scorer(*rewards: RewardConfig, workers=1, timeout=0.8, memory=0.5, max_failure_rate=1.0, **kwargs) -> Scorer:
    scoring = ScoringConfig(workers=workers, timeout=timeout, memory_limit_gb=memory, max_failure_rate=max_failure_rate)
    return Scorer(list(rewards), scoring, **kwargs)


def alive(pid: int) -> bool:
    """Running, and not a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# ----------------------------------------------------------------------------------------- one bad completion costs one


@pytest.mark.parametrize(
    ("function", "verdict"),
    [
        ("raises", "error"),
        ("loops", "timeout"),
        ("power_tower", "timeout"),
        ("exits", "crashed"),
        ("system_exit", "error"),
        ("segfault", "crashed"),
        ("killed", "crashed"),
        ("memory", "error"),
        ("rude", "error"),
        ("await_forever", "timeout"),
        ("async_loops", "timeout"),
        ("async_rude", "error"),
        ("nan", "not_finite"),
        ("infinite", "not_finite"),
    ],
)
def test_one_bad_completion_costs_one(functions, function, verdict):
    with scorer(RewardConfig(path=f"{functions}:{function}")) as s:
        groups = [group("a", "bb", "bad", "cccc"), group("a", "bb", id=1)]
        s.score(groups, step=1)
        assert groups[0].rewards == [1.0, 2.0, None, 4.0]
        assert groups[0].rewards_by_function == {function: [1.0, 2.0, None, 4.0]}
        assert groups[0].verdicts[function] == {verdict: 1}
        assert groups[1].rewards == [1.0, 2.0]
        s.score(groups[1:], step=2)  # and the worker is there again
        assert groups[1].rewards == [1.0, 2.0]
        assert all(map(alive, s.worker_pids))


def test_a_function_that_needs_its_group_loses_the_group(functions):
    with scorer(RewardConfig(path=f"{functions}:whole", needs_group=True)) as s:
        groups = [group("a", "bad", "c"), group("a", "b", "c", id=1)]
        s.score(groups, step=1)
    assert groups[0].rewards == [None, None, None]
    assert groups[0].verdicts == {"whole": {"timeout": 3}}
    assert groups[1].rewards == [3.0, 3.0, 3.0]


def test_a_worker_killed_while_idle_costs_nothing(functions):
    with scorer(RewardConfig(path=f"{functions}:pid", needs_group=True)) as s:
        (first,) = s.worker_pids
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: not alive(first))
        g = group("a")
        s.score([g], step=1)
        assert g.rewards == [float(s.worker_pids[0])]
        assert s.worker_pids != [first]


def test_a_worker_killed_at_work_loses_nothing_that_can_be_scored_again(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def slow(completions, **kwargs):\n"
        f"    pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "    time.sleep(0.4)\n"
        "    return [1.0] * len(completions)\n"
    )
    with scorer(RewardConfig(path=f"{tmp_path}/slow.py:slow"), timeout=5) as s:
        (first,) = s.worker_pids

        def kill() -> None:
            assert wait_until((tmp_path / "started").exists)
            os.kill(first, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        g = group("a", "b")
        s.score([g], step=1)
        killer.join()
        assert g.rewards == [1.0, 1.0]
        assert s.worker_pids != [first]


def test_a_hang_is_killed_in_time_with_all_its_processes(tmp_path):
    (tmp_path / "spawns.py").write_text(
        "import subprocess, pathlib, time\n"
        "def spawns(completions, **kwargs):\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "    time.sleep(1000)\n"
    )
    with scorer(RewardConfig(path=f"{tmp_path}/spawns.py:spawns", timeout=0.4), timeout=100) as s:
        started = time.monotonic()
        s.score([group("a")], step=1)
        assert time.monotonic() - started < 3
        child = int((tmp_path / "pid").read_text())
        assert wait_until(lambda: not alive(child))


# --------------------------------------------------------------------------------------------------- mistakes of a user


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("too_few", "returned 1 values .*one entry for each of the 3 completions"),
        ("nothing", "returned NoneType None; expected a list"),
        ("one_number", "returned float 1.0; expected a list"),
        ("words", "returned a list with str 'good'; expected numbers, or None"),
        ("extra_short", r"log_extra\('x'\) got 1 values .*each of the 3 completions"),
    ],
)
def test_a_broken_contract_ends_the_run_by_name(functions, function, said):
    with (
        scorer(RewardConfig(path=f"{functions}:{function}")) as s,
        pytest.raises(RunError, match=rf"reward '{function}' \(.*my_rewards.py:{function}\) {said}"),
    ):
        s.score([group("a", "b", "c")], step=1)


def test_too_many_failures_end_the_run_with_the_first_traceback(functions):
    with scorer(RewardConfig(path=f"{functions}:raises"), max_failure_rate=0.5) as s:
        g = group("a", "b", "bad", "bad")
        s.score([g], step=6)  # half is allowed
        assert g.rewards == [1.0, 1.0, None, None]
        with pytest.raises(RunError) as error:
            s.score([group("a", "bad", "bad", "bad", id=41)], step=7)
    message = str(error.value)
    for part in ("step 7", "'raises'", "my_rewards.py", "3 of 4", "error 3", "prompt 41, completion 1", "KeyError"):
        assert part in message
    assert 'return _each(completions, lambda c: {}["no such key"])' in message
    assert "scoring_" not in message  # our own frames are of no use to a user


def test_too_much_that_is_not_finite_ends_the_run_by_name(functions):
    said = r"reward .nan. \(.*my_rewards.py:nan\).*not_finite 1.*prompt 7, completion 1: it returned nan; expected a f"
    with scorer(RewardConfig(path=f"{functions}:nan"), max_failure_rate=0.0) as s, pytest.raises(RunError, match=said):
        s.score([group("a", "bad", id=7)], step=1)


@pytest.mark.parametrize("function", ["loops", "power_tower", "await_forever"])
def test_where_it_hung_is_told(functions, function):
    with (
        scorer(RewardConfig(path=f"{functions}:{function}"), max_failure_rate=0.0) as s,
        pytest.raises(RunError, match=r"no result after 0.8 s(.|\n)*my_rewards.py\", line \d+"),
    ):
        s.score([group("bad")], step=1)


def test_broken_gold_counts_as_failure_and_none_of_ones_own_does_not(functions):
    with scorer(RewardConfig(path=f"{functions}:ints_and_none"), max_failure_rate=0.0) as s:
        g = group("a", "bad")
        s.score([g], step=1)
        assert g.rewards == [1.0, None]
        assert g.verdicts == {"ints_and_none": {"unscored": 1}}
    with scorer(RewardConfig(name="countdown"), max_failure_rate=0.5) as s:
        g = group("<answer>1</answer>", columns={"nums": ["1"], "target": 1})
        with pytest.raises(RunError, match=r"\(gold_unparseable 1\), more than(.|\n)*nums and target must be integers"):
            s.score([g], step=1)


LOAD_ERRORS = {
    "import_error.py:fn": (
        "import nothing_like_this\n",
        r"import_error.py:1: ModuleNotFoundError: .*nothing_like_this",
    ),
    "hungry.py:fn": ("x = 1\nn = 10**11\nb'x' * n\n", r"hungry.py:3: MemoryError.*scoring.memory_limit_gb"),
    "syntax.py:fn": ("x = 1\ndef fn(:\n", r"syntax.py:2: SyntaxError"),
    "quits.py:fn": ("import sys\n\nsys.exit('bye')\n", r"quits.py:3: SystemExit: bye"),
    "dies.py:fn": ("import os\nos._exit(3)\n", r"exited with status 3"),
    "other.py:fn": ("def reward(completions, **kwargs): ...\n", r"other.py has no 'fn' \(it has: reward\)"),
    "value.py:fn": ("fn = 3\n", r"'fn' in .*value.py is no function but 3"),
    "missing.py:fn": (None, r"there is no file .*missing.py"),
    "no_name.py:1fn": ("", r"rewards\[0\].path: expected file.py:name or package.module:name, got"),
}


@pytest.mark.parametrize("path", LOAD_ERRORS)
def test_a_function_that_cannot_be_loaded(tmp_path, path):
    text, said = LOAD_ERRORS[path]
    if text is not None:
        (tmp_path / path.partition(":")[0]).write_text(text)
    with pytest.raises(UserError, match=said):
        scorer(RewardConfig(path=f"{tmp_path}/{path}"))


def test_all_functions_that_cannot_be_loaded_are_named_at_once(tmp_path):
    (tmp_path / "a.py").write_text("1/0\n")
    with pytest.raises(
        UserError, match=r"rewards\[0\].*a.py:1: ZeroDivisionError(.|\n)*rewards\[2\] \(no_such_pkg:fn\)"
    ):
        scorer(
            RewardConfig(path=f"{tmp_path}/a.py:fn"), RewardConfig(name="format"), RewardConfig(path="no_such_pkg:fn")
        )


def test_an_unknown_builtin_lists_those_there_are():
    with pytest.raises(UserError, match=r"no built-in reward 'countdwon' \(there are: .*countdown.*format"):
        scorer(RewardConfig(name="countdwon"))


def test_arguments_and_columns_are_checked(functions):
    with pytest.raises(UserError, match=r"args: it takes no scale \(it takes: nums, target\)"):
        scorer(RewardConfig(name="countdown", args={"scale": 2}))
    with pytest.raises(UserError, match=r"args\.status is a name the trainer passes itself"):
        scorer(RewardConfig(path=f"{functions}:length", args={"status": 2}))
    with scorer(RewardConfig(name="countdown")) as s:
        with pytest.raises(UserError, match=r"needs target: neither a column of the rows \(answer, nums\) nor"):
            s.score([group("a", columns={"nums": [1], "answer": 1})], step=1)
        with pytest.raises(UserError, match="the rows have a column 'status'"):
            s.score([group("a", columns={"nums": [1], "target": 1, "status": "new"})], step=1)


# ----------------------------------------------------------------------------------------------------- what a user gets


def test_what_a_function_sees_and_says(functions):
    reward = RewardConfig(path=f"{functions}:sees", args={"bonus": 0.5})
    with scorer(reward, max_steps=100) as s:
        g = group("a", "bb", columns={"nums": [1, 2]}, prefill="<think>")
        g.completions[1].status = Status.LENGTH
        s.score([g], step=7)
    assert g.rewards == [0.5, 0.5]
    assert g.extra_columns == {"seen": ["p|a|[1]|stop|<think>|[]", "p|bb|[2]|length|<think>|[1, 2]"]}
    assert g.extra_metrics == {"step_seen": [107.0]}
    assert g.verdicts == {"sees": {"fine": 2}}
    assert g.prompt.columns == {"nums": [1, 2]}


def test_chat_prompts_and_completions_are_messages(tmp_path):
    (tmp_path / "chat.py").write_text(
        "def chat(prompts, completions, **kwargs):\n"
        "    assert [p[0]['content'] for p in prompts] == ['hi', 'hi']\n"
        "    assert completions == [[{'role': 'assistant', 'content': c}] for c in 'xy']\n"
        "    return [1, 2]\n"
    )
    with scorer(RewardConfig(path=f"{tmp_path}/chat.py:chat"), RewardConfig(name="format")) as s:
        g = group("x", "y", prompt=[{"role": "user", "content": "hi"}])
        s.score([g], step=1)
    assert g.rewards_by_function == {"chat": [1.0, 2.0], "format": [0.0, 0.0]}


def test_weighted_sum_leaves_out_what_could_not_be_scored(functions):
    with scorer(
        RewardConfig(path=f"{functions}:raises", weight=10),
        RewardConfig(name="format", weight=0.5),
        RewardConfig(path=f"{functions}:ints_and_none", weight=3),
        RewardConfig(name="format", weight=0.0),
    ) as s:
        assert s.names == ["raises", "format", "ints_and_none", "format#2"]
        g = group("<think>a</think><answer>b</answer>", "bad", "")
        g.completions[2].status = Status.ERROR
        s.score([g], step=1)
    assert g.rewards == [10 * 34 + 0.5 + 3, 0.0, None]
    assert g.verdicts["raises"] == {"error": 1, "not_generated": 1}
    assert g.verdicts["format"] == {"correct": 1, "wrong": 1, "not_generated": 1}
    only = group("bad")
    with scorer(RewardConfig(path=f"{functions}:raises")) as s:
        s.score([only], step=1)
    assert only.rewards == [None]


def test_a_function_without_kwargs_gets_what_it_names(functions):
    with scorer(RewardConfig(path=f"{functions}:plain")) as s:
        g = group("a", columns={"target": 8, "nums": [1]})
        s.score([g], step=1)
    assert g.rewards == [4.0]


def test_async_calls_of_a_step_are_awaited_together(functions):
    with scorer(RewardConfig(path=f"{functions}:awaits"), timeout=5) as s:
        groups = [group("a", "bb", id=i) for i in range(20)]
        started = time.monotonic()
        s.score(groups, step=1)
        assert time.monotonic() - started < 2  # one after the other: 6 s
    assert all(g.rewards == [1.0, 2.0] for g in groups)


def test_a_module_on_the_path_and_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "judge.py").write_text(
        "from my_pkg.help import one\ndef fn(completions, **kw): return one(completions)"
    )
    (tmp_path / "my_pkg" / "help.py").write_text("def one(cs): return [1] * len(cs)")
    (tmp_path / "rewards").mkdir()  # a folder of the user's that must not shadow ours
    (tmp_path / "rewards" / "__init__.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    with scorer(RewardConfig(path="my_pkg.judge:fn"), RewardConfig(name="format")) as s:
        g = group("a")
        s.score([g], step=1)
    assert g.rewards_by_function == {"fn": [1.0], "format": [0.0]}


def test_workers_import_neither_torch_nor_the_schema(functions):
    with scorer(RewardConfig(path=f"{functions}:torch_here"), RewardConfig(name="countdown")) as s:
        g = group("a", columns={"nums": [1], "target": 1})
        s.score([g], step=1)
    assert g.rewards_by_function["torch_here"] == [0.0]


def test_512_countdown_completions_take_well_under_a_second():
    groups = [
        group(*["<think>so</think><answer>3*8 = 24</answer>"] * 16, id=i, columns={"nums": [3, 8], "target": 24})
        for i in range(32)
    ]
    with scorer(RewardConfig(name="countdown"), workers=2, timeout=10) as s:
        s.score(groups[:2], step=0)
        seconds = []
        for step in range(3):
            started = time.monotonic()
            s.score(groups, step)
            seconds.append(time.monotonic() - started)
    assert all(g.rewards == [1.0] * 16 for g in groups)
    assert min(seconds) < 0.5  # 0.03 s on an idle machine


# -------------------------------------------------------------------------------------------------- no process is left


def test_closing_ends_workers_even_those_at_work(functions):
    s = scorer(RewardConfig(path=f"{functions}:loops"), workers=2, timeout=60)
    pids = s.worker_pids
    assert len(set(pids)) == 2
    closer = threading.Timer(0.3, s.close)
    closer.start()
    started = time.monotonic()
    with pytest.raises(RunError, match="closed"):
        s.score([group("bad"), group("bad", id=1)], step=1)
    closer.join()
    s.close()
    assert time.monotonic() - started < 5
    assert not any(map(alive, pids))


def test_workers_outlive_the_thread_that_made_the_scorer(functions):
    made: list[Scorer] = []
    thread = threading.Thread(target=lambda: made.append(scorer(RewardConfig(path=f"{functions}:pid"))))
    thread.start()
    thread.join()
    with made[0] as s:
        pids = s.worker_pids
        time.sleep(0.1)
        g = group("a")
        s.score([g], step=1)
        assert g.rewards == [float(pids[0])]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
@pytest.mark.parametrize("function", ["length", "loops", "power_tower"])
def test_no_worker_outlives_a_killed_trainer(functions, function):
    trainer = textwrap.dedent(
        f"""
        from grpo.config import RewardConfig, ScoringConfig
        from grpo.scoring.scorer import Scorer
        from grpo.types import Completion, Group, Prompt, Status
        scorer = Scorer([RewardConfig(path={f"{functions}:{function}"!r})], ScoringConfig(workers=2, timeout=60))
        print(*scorer.worker_pids, flush=True)
        groups = [Group(Prompt(i, "p", "p", []), [Completion([], [], Status.STOP, "bad", [])]) for i in range(2)]
        scorer.score(groups, step=1)
        input()
        """
    )
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", trainer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
        text=True,
    )
    with process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.3)
        assert all(map(alive, pids))
        process.kill()
        process.wait()
        assert wait_until(lambda: not any(map(alive, pids)))


def test_a_worker_whose_trainer_died_before_it_could_ask_ends_at_once():
    boot = "from grpo.scoring.worker import serve; serve(0, 1, 999999999)"  # the parent it expects is not its own
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", boot], env={**os.environ, "PYTHONPATH": root}, stdin=subprocess.DEVNULL, timeout=10
    )
    assert ended.returncode == 1


def test_ctrl_c_and_sigterm_are_the_trainers(functions):
    with scorer(RewardConfig(path=f"{functions}:pid")) as s:
        (pid,) = s.worker_pids
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        g = group("a")
        s.score([g], step=1)
        assert g.rewards == [float(pid)]
