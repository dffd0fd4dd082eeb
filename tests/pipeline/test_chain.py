"""A chain's decisions: what runs, what stays, and what a failure says. Something stands in for stages' processes here;
real ones are killed in tests/processes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo.errors import Preempted, RunError, UserError
from grpo.pipeline import chain as chain_module
from grpo.pipeline import child
from grpo.pipeline import summary as summary_module
from grpo.pipeline.chain import dry_run, run_chain
from grpo.pipeline.chain_file import load_chain
from grpo.pipeline.summary import lines
from tests.pipeline.test_chain_file import CHAIN, RL, SFT

Calls = list[str]
PAGE = summary_module.write_page


class Maker:
    """In place of a stage's process: what it makes is a function of what it is given, to the byte."""

    def __init__(self) -> None:
        self.calls: Calls = []
        self.fails: dict[str, Exception] = {}
        self.meanwhile: Callable[[], Any] = lambda: None
        self.same: set[str] = set()  # stages that make the same whatever they are given

    def __call__(self, command: list[str], what: str, tick: Callable[[], None] = lambda: None) -> None:
        tick()
        name = what.removeprefix("stage ").split(" (")[0]
        self.calls.append(name)
        self.meanwhile()
        if name in self.fails:
            raise self.fails[name]
        kind = command[3]
        if kind == "measure":
            request = Path(command[4])
            asked = json.loads(request.read_text())
            model = json.loads(asked["overrides"][-1].removeprefix("model.name="))
            figures = {"hash": asked["hash"], "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "length": 9.0,
                       "form": 0.7, "form_low": 0.6, "form_high": 0.8, "tasks": 2, "seconds": 1.0, "model": model,
                       "judged_by": "countdown"}  # fmt: skip
            (request.parent / "evaluation.json").write_text(json.dumps(figures))
            row = {"step": 0, "seed": 0, "prompt_id": 1, "sample": 0, "prompt": "3 4 = 7", "completion": name,
                   "status": "stop", "num_tokens": 9, "reward": 1.0,
                   "rewards": {"countdown": float(len(name) % 2)}}  # fmt: skip
            (request.parent / "evaluation.jsonl").write_text(json.dumps(row) + "\n")
            return
        given = [word for word in command[5:] if "output_dir" not in word and word != "--resume"]
        for word in list(given):
            path = word.partition('="')[2].rstrip('"')
            if path.startswith("out") and Path(path).exists():
                files = sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]
                given += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        content = "same" if name in self.same else hashlib.sha256(repr(given).encode()).hexdigest()
        if kind == "train":
            final = Path("out") / name / "run" / "final"
            final.mkdir(parents=True)
            (final / "model.safetensors").write_text(content)
        else:
            Path(f"out/{name}/rows.jsonl").write_text(json.dumps(content) + "\n")


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text(SFT)
    Path("rl.yaml").write_text(RL)
    Path("chain.yaml").write_text(CHAIN)
    monkeypatch.setattr(summary_module, "write_page", lambda folder, summary: None)  # it draws for half a second
    made = Maker()
    monkeypatch.setattr(chain_module.child, "run", made)
    return made


def run(maker: Maker, *overrides: str) -> Calls:
    maker.calls.clear()
    run_chain(load_chain("chain.yaml", overrides))
    return maker.calls


ALL = ["cold", "measuring cold", "rl", "measuring rl", "sampled", "again", "measuring again", "tested"]


def test_what_is_there_is_not_made_again(maker: Maker) -> None:
    assert run(maker) == ALL
    assert run(maker) == []
    assert list(dry_run(load_chain("chain.yaml"))) == [
        *("cold (sft) is there", "rl (grpo) is there", "sampled (sample) is there", "again (sft) is there"),
        "tested (eval) is there",
    ]


def test_a_change_runs_what_depends_on_it_and_nothing_else(maker: Maker) -> None:
    run(maker)
    before = Path("out/sampled/rows.jsonl").read_text()
    assert list(dry_run(load_chain("chain.yaml", ["stages.sampled.n=5"]))) == [
        "cold (sft) is there",
        "rl (grpo) is there",
        "sampled (sample) would run: it is made of something else (n: 4 -> 5)",
        "again (sft) would run: it depends on sampled",
        "tested (eval) would run: it depends on again",
    ]
    assert run(maker, "stages.sampled.n=5") == ["sampled", "again", "measuring again", "tested"]
    assert Path("out/sampled.previous/rows.jsonl").read_text() == before
    assert run(maker, "stages.sampled.n=5") == []


def test_the_recipes_file_counts_and_what_nothing_depends_on_does_not(maker: Maker) -> None:
    run(maker)
    Path("rl.yaml").write_text(RL.replace("seed: 5", "seed: 5, save_every: 7, ddp_timeout: 100"))
    assert run(maker) == []
    Path("rl.yaml").write_text(RL + "rollout: {top_p: 0.9}\n")
    # All that is made by that recipe, the measure too. What is made here is the same, so `again` stays.
    assert run(maker) == ["measuring cold", "rl", "measuring rl", "sampled", "measuring again", "tested"]


def test_where_a_stage_makes_the_same_those_behind_it_stay(maker: Maker) -> None:
    maker.same.add("rl")
    run(maker)
    assert run(maker, "stages.rl.overrides.training.max_steps=9") == ["rl", "measuring rl"]


def test_another_measure_measures_alone(maker: Maker) -> None:
    run(maker)
    measured = ["measuring cold", "measuring rl", "measuring again"]
    assert run(maker, "evaluate.seeds=[0, 1, 2]") == measured
    assert run(maker, "evaluate.seeds=[0, 1, 2]", "evaluate.at_start=true") == ["measuring start"]


@pytest.mark.parametrize("how", ["removed", "changed", "touched"])
def test_what_a_stage_made_must_still_be_there(maker: Maker, how: str) -> None:
    run(maker)
    file = Path("out/rl/run/final/model.safetensors")
    if how == "removed":
        shutil.rmtree(file.parent)
    else:
        file.write_text("something else" if how == "changed" else file.read_text())
    expected = {"removed": ["rl", "measuring rl"], "changed": ["rl", "measuring rl"], "touched": []}
    assert run(maker) == expected[how]  # what depends on it gets the same bytes as before, and stays


def test_files_that_a_recipe_names_count(maker: Maker) -> None:
    Path("mine.py").write_text("def style(prompts, completions, **kwargs): return [1.0 for _ in completions]\n")
    Path("words.txt").write_text("one")
    mine = (
        'stages.rl.overrides.rewards=[{name: countdown}, {path: "mine.py:style", weight: 0.1, args: {file: words.txt}}]'
    )
    run(maker, mine)
    assert run(maker, mine) == []
    Path("words.txt").write_text("two")
    assert run(maker, mine)[:1] == ["rl"]
    Path("mine.py").write_text("def style(prompts, completions, **kwargs): return [0.0 for _ in completions]\n")
    assert "files.rewards.1.path" in list(dry_run(load_chain("chain.yaml", [mine])))[1]


def test_a_stage_that_failed_is_gone_on_with(maker: Maker) -> None:
    maker.fails["sampled"] = RunError("stage sampled (sample) was ended by SIGKILL")
    with pytest.raises(RunError, match="stage sampled"):
        run(maker)
    Path("out/sampled/half").write_text("of it")
    state = json.loads(Path("out/sampled/stage.json").read_text())
    assert (state["status"], state["attempts"]) == ("running", 1)
    assert list(dry_run(load_chain("chain.yaml")))[2] == "sampled (sample) would go on: it was not finished"
    maker.fails.clear()
    assert run(maker) == ["sampled", "again", "measuring again", "tested"]
    assert Path("out/sampled/half").exists()
    assert json.loads(Path("out/sampled/stage.json").read_text())["attempts"] == 2
    maker.fails["rl"] = RunError("no")
    with pytest.raises(RunError):
        run(maker, "stages.rl.overrides.training.max_steps=9")
    maker.fails.clear()
    assert run(maker)[:1] == ["rl"]  # what was begun is of something else: never gone on with
    assert not Path("out/rl/half").exists()


def test_the_summary_has_every_stage(maker: Maker) -> None:
    summary = run_chain(load_chain("chain.yaml", ["evaluate.at_start=true", "dollars_per_hour=3600"]))
    assert json.loads(Path("out/summary.json").read_text()) == summary
    rows = {row["name"]: row for row in summary["stages"]}
    assert list(rows) == ["start", "cold", "rl", "sampled", "again", "tested"]
    for row in rows.values():
        assert {"name", "kind", "accuracy", "accuracy_low", "accuracy_high", "length", "form", "seconds"} <= row.keys()
    assert (rows["rl"]["accuracy"], rows["rl"]["form"], rows["rl"]["tasks"]) == (0.5, 0.7, 2)
    assert (rows["sampled"]["accuracy"], rows["sampled"]["rows"]) == (None, 1)
    assert rows["rl"]["cost_usd"] == pytest.approx(rows["rl"]["seconds"], abs=1e-3)
    table = list(lines(summary))
    assert table[2].split()[:5] == ["cold", "sft", "0.500", "[0.400,", "0.600]"]
    PAGE(Path("out"), summary)
    page = Path("out/report.html").read_text()
    for said in ("6 stages", "Held-out accuracy", "Form", "3 4 = 7", "measuring again", "The same tasks"):
        assert said in re.sub("<[^>]+>", "", page)  # what a neighbour also says is dimmed


def test_one_process_at_a_time_runs_a_chain(maker: Maker) -> None:
    maker.meanwhile = lambda: run_chain(load_chain("chain.yaml"))
    with pytest.raises(UserError, match="output_dir: this process already runs in out"):
        run_chain(load_chain("chain.yaml"))


def test_a_program_that_launches_must_be_there(maker: Maker) -> None:
    with pytest.raises(UserError, match="launch: there is no program acelerate"):
        run_chain(load_chain("chain.yaml", ["launch=[acelerate, launch]"]))
    assert maker.calls == []


# --- the process -----------------------------------------------------------------------------------------------------

SHELL = "/bin/sh"


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        ("exit 2", UserError, "stage x: it cannot run as it is"),
        ("exit 1", RunError, "stage x failed with exit code 1; what it said is above. The same command goes on"),
        ("kill -9 $$", RunError, "stage x was ended by SIGKILL (where memory runs out, the system does that)"),
        ("exit 143", Preempted, "stage x: asked to stop; the same command goes on"),
    ],
)
def test_how_a_process_ended_is_told(script: str, error: type[BaseException], said: str) -> None:
    with pytest.raises(error) as told:
        child.run([SHELL, "-c", script], "stage x")
    assert said in str(told.value)


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="stage x: nowhere cannot be started: No such file"):
        child.run(["nowhere"], "stage x")


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGHUP, Preempted), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_request_to_stop_is_handed_on_and_waited_for(
    number: signal.Signals, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process saves what it has before it ends."""
    monkeypatch.setattr(child, "EVERY", 0.02)
    ready, saved, ticks = tmp_path / "ready", tmp_path / "saved", []
    heard = "INT" if number == signal.SIGINT else "TERM"
    script = f"trap 'sleep 0.1; echo > {saved}; exit 143' {heard}; echo > {ready}; while :; do sleep 0.01; done"

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    thread = threading.Thread(target=stop)
    thread.start()
    before = signal.getsignal(number)
    with pytest.raises(error):
        child.run([SHELL, "-c", script], "stage x", lambda: ticks.append(1))
    thread.join()
    assert saved.exists()
    assert ticks
    assert signal.getsignal(number) == before


def test_a_process_ends_with_the_chains(tmp_path: Path) -> None:
    """Also where that is killed, and can hand nothing on."""
    import subprocess

    ended, ready = tmp_path / "ended", tmp_path / "ready"
    inner = f"trap 'echo > {ended}; exit' TERM; echo > {ready}; while :; do sleep 0.01; done"
    script = f"from grpo.pipeline.child import run; run({[SHELL, '-c', inner]!r}, 'x')"
    outer = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    until = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < until:
        time.sleep(0.01)
    outer.kill()
    outer.wait()
    while not ended.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert ended.exists()
