"""metrics.jsonl is complete and exact whatever the trackers do; a resumed run continues it without a line twice."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.config import TrackingConfig
from grpo.errors import RunError, UserError
from grpo.run import trackers
from grpo.run.fields import COST
from grpo.run.log import RunLog
from tests.run.test_screen import EVALUATION

RECIPE = {"training": {"max_seconds": None}, "model": {"name": "tiny"}}


def open_run_log(folder: Path, resume_offset: int | None = None, **tracking: object) -> RunLog:
    return RunLog(folder, TrackingConfig(**tracking), recipe_dict=RECIPE, resume_offset=resume_offset, total_steps=100)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rollouts_of_steps_that_a_run_goes_back_behind_are_forgotten(tmp_path):
    with open_run_log(tmp_path) as run_log:
        offsets = []
        for step in (0, 1, 2):
            run_log.log(step, {"reward": 0.5})
            run_log.log_rollouts(step, [{"completion": "a"}])
            offsets.append(run_log.offset)
        run_log.log_rollouts(2, [{"completion": "a"}], prefix="eval")
    with open_run_log(tmp_path, resume_offset=offsets[1]):
        assert sorted(file.name for file in (tmp_path / "rollouts").iterdir()) == [
            "step_000000.jsonl",
            "step_000001.jsonl",
        ]


def test_numbers_read_back_to_the_same_bits_and_non_finite_ones_are_null(tmp_path):
    values = {
        "float": 0.1 + 0.2,
        "tiny": 5e-324,
        "torch": torch.tensor(1 / 3, dtype=torch.float64),
        "numpy": np.float32(0.1),
        "int": 3,
        "nan": math.nan,
        "inf": torch.tensor(math.inf),
        "none": None,
    }
    with open_run_log(tmp_path) as run_log:
        run_log.log(1, values)
    (line,) = lines(tmp_path)
    assert line == {
        "step": 1,
        "float": 0.1 + 0.2,
        "tiny": 5e-324,
        "torch": 1 / 3,
        "numpy": float(np.float32(0.1)),
        "int": 3,
        "nan": None,
        "inf": None,
        "none": None,
    }


def test_resuming_cuts_what_will_be_written_again(tmp_path):
    with open_run_log(tmp_path) as run_log:
        run_log.log(0, EVALUATION)
        run_log.log(1, {"reward": 0.1})
        offset = run_log.offset
        run_log.log(2, {"reward": 0.2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # killed while writing
    assert offset == len(
        "".join(f"{json.dumps(line)}\n" for line in [{"step": 0, **EVALUATION}, {"step": 1, "reward": 0.1}])
    )

    with open_run_log(tmp_path, resume_offset=offset) as run_log:
        assert run_log.offset == offset
        run_log.log(2, {"reward": 0.2})
        assert run_log.offset > offset
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]

    with open_run_log(tmp_path, resume_offset=0) as run_log:  # killed before the first checkpoint
        run_log.log(1, {"reward": 0.1})
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_log_shorter_than_its_checkpoint_is_said(tmp_path, caplog):
    with open_run_log(tmp_path) as run_log:
        run_log.log(1, {"reward": 0.1})
    open_run_log(tmp_path, resume_offset=1000).close()
    assert "its checkpoint saw 1000" in caplog.text
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("line", ["no json", "[1]", '{"reward": 1}', '{"step": null}', "\x00\x01", '{"step": 1, "rew'])
def test_a_line_that_no_run_writes_is_named_when_a_run_goes_on(tmp_path, line):
    good = '{"step": 1, "step_time": "x"}\n'
    (tmp_path / "metrics.jsonl").write_text(f"{good}{line}\n{good}")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a"):
        open_run_log(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(f"{good}{line}")  # killed while writing; what is whole is read
    if line in ("no json", "\x00\x01", '{"step": 1, "rew'):
        open_run_log(tmp_path).close()


def test_rollouts_are_written_whole_or_not_at_all(tmp_path):
    rows = [
        {
            "completion": "naïve 😀 \udc80 </script>\n",
            "reward": math.nan,
            "rewards": {"f": math.inf},
            "columns": {"p": Path("x")},
        },
        {"completion": "", "reward": 1.0, "rewards": {"f": None}, "columns": {"nums": (1, 2)}},
    ]

    def torn():
        yield rows[0]
        raise KeyError("no more")

    with open_run_log(tmp_path) as run_log:
        path = run_log.log_rollouts(7, rows)
        assert run_log.log_rollouts(0, rows, prefix="eval").name == "eval_000000.jsonl"
        with pytest.raises(KeyError):
            run_log.log_rollouts(7, torn())
    assert path == tmp_path / "rollouts" / "step_000007.jsonl"
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert read[0] == {
        "completion": "naïve 😀 \udc80 </script>\n",
        "reward": None,
        "rewards": {"f": None},
        "columns": {"p": "x"},
    }
    assert read[1]["columns"] == {"nums": [1, 2]}
    assert "naïve 😀" in path.read_text(encoding="utf-8")


def test_a_disk_that_refuses_stops_the_run_with_the_path(tmp_path):
    run_log = open_run_log(tmp_path)
    (tmp_path / "rollouts").write_text("in the way")
    with pytest.raises(RunError, match="rollouts"):
        run_log.log_rollouts(1, [{}])
    run_log._file.close()
    run_log._file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(RunError, match=r"metrics\.jsonl.*No space"), run_log:
        run_log.log(1, {"reward": 1.0})


# ---------------------------------------------------------------------------------------------------------------------
# Trackers


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_run_log(tmp_path, tensorboard=True) as run_log:
        for step in (1, 2, 3):
            run_log.log(step, {"reward": step / 4, "kl": math.nan, "rewards/a/logged/\ud800": 1.0})
        offset = run_log.offset
        run_log.log(4, {"reward": 99.0})
    with open_run_log(tmp_path, tensorboard=True, resume_offset=offset) as run_log:
        run_log.log(4, {"reward": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert sorted(events.Tags()["scalars"]) == ["reward", "rewards/a/logged/\\ud800"]


@pytest.mark.slow
def test_wandb_offline_writes_a_run_and_resumes_it(tmp_path, monkeypatch):
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for resume_offset in (None, 0):
        with open_run_log(tmp_path / "run", resume_offset, wandb="offline", project="p") as run_log:
            run_log.log(1, {"reward": 0.5})
        assert len(lines(tmp_path / "run")) == 1
    written = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 2
    assert len({path.stem for path in written}) == 1  # the same run id
    give_up = time.monotonic() + 30  # wandb writes from a process of its own
    while not all(b"reward" in path.read_bytes() for path in written):
        assert time.monotonic() < give_up
        time.sleep(0.1)


def test_a_tracker_that_is_not_installed_is_a_user_error_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"tracking\.wandb.*grpo-train\[wandb\].*tracking\.trackio.*pip install trackio"
    ):
        open_run_log(tmp_path, wandb="offline", trackio=True)
    open_run_log(tmp_path).close()


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_tracker_that_crashes_never_disturbs_training(tmp_path, monkeypatch, caplog, failing):
    """A stand-in for the wandb module that fails at one place, as the real one does without a server."""
    calls = []

    class Run:
        url = None

        def log(self, metrics, step):
            calls.append(step)
            if failing == "log":
                raise BrokenPipeError("the service is gone")

        def finish(self):
            if failing == "finish":
                raise TimeoutError("upload")

    class Wandb:
        Settings = dict

        @staticmethod
        def init(**_):
            if failing == "init":
                raise RuntimeError("no quota\nsecond line")
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    with caplog.at_level(logging.WARNING, "grpo"), open_run_log(tmp_path, wandb="offline") as run_log:
        for step in (1, 2, 3):
            run_log.log(step, {"reward": 1.0})
    assert len(lines(tmp_path)) == 3
    assert len([record for record in caplog.records if "wandb failed" in record.message]) == 1
    assert calls == {"init": [], "log": [1], "finish": [1, 2, 3]}[failing]


def test_wandb_online_without_a_server_goes_on_offline(tmp_path, monkeypatch, caplog):
    modes = []

    class Run:
        url = None
        log = finish = staticmethod(lambda *_, **__: None)

    class Wandb:
        Settings = dict

        @staticmethod
        def init(mode, **_):
            modes.append(mode)
            if mode == "online":
                raise ConnectionError("no route to host")
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    open_run_log(tmp_path, wandb="online").close()
    assert modes == ["online", "offline"]
    assert "no route to host" in caplog.text
    assert "wandb sync" in caplog.text


@pytest.mark.slow
def test_wandb_online_and_unreachable_writes_offline_to_the_end(tmp_path, monkeypatch, caplog):
    """The real wandb: its service remembers the run that could not start."""
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(trackers, "SECONDS_TO_INIT", 3)
    monkeypatch.setattr(sys, "argv", ["grpo", "train", "x.yaml", "rewards.0.args.api_key=hunter2-hunter2"])
    with caplog.at_level(logging.WARNING, "grpo"), open_run_log(tmp_path / "run", wandb="online") as run_log:
        run_log.log(1, {"reward": 0.5})
    assert "wandb cannot go online" in caplog.text
    assert "switched off" not in caplog.text
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    give_up = time.monotonic() + 30
    while b"reward" not in written.read_bytes():
        assert time.monotonic() < give_up
        time.sleep(0.1)
    for file in filter(Path.is_file, (tmp_path / "run").rglob("*")):
        assert b"hunter2" not in file.read_bytes(), file


def test_a_price_is_counted_by_the_wall_clock_and_goes_on_at_a_resume(tmp_path):
    def logged(resume_offset: int | None) -> list[float]:
        recipe = {"training": {"dollars_per_hour": 3600.0}}
        with RunLog(
            tmp_path, TrackingConfig(), recipe_dict=recipe, resume_offset=resume_offset, total_steps=9
        ) as run_log:
            for step in (1, 2):
                run_log.log(step, {"reward": 0.1})
        return [line[COST] for line in lines(tmp_path)]

    first = logged(None)
    assert 0 < first[0] <= first[1]
    again = logged(0)  # what was paid for steps that are repeated is paid
    assert again[0] >= first[1] + first[0]
