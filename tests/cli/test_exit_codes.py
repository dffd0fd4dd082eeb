"""How a command ends: its exit code, what is said, and by which process."""

from __future__ import annotations

import errno
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.cli.main import main
from grpo.errors import Preempted, RunError, UserError
from grpo.run import peers
from tests.cli.conftest import ROOT, run


def failing(error: BaseException):
    def train(recipe, resume, **_):
        raise error

    return train


def test_a_lost_process_explains_whatever_a_collective_made_of_it(stand_in, monkeypatch):
    lost = peers.Loss("rank 3 (on node-b) was lost in step 7: its process was killed", code=4)
    monkeypatch.setattr(peers, "loss", lambda: lost)
    stand_in("trainer", train=failing(RuntimeError("Connection closed by peer")))
    result = run("train", "recipe.yaml")
    assert result.exit_code == 4
    assert result.stderr == f"{lost.text}\n{peers.ADVICE}\n"


def test_the_last_words_of_a_failing_process_go_to_the_others(stand_in, monkeypatch):
    said = []
    monkeypatch.setattr(peers, "say_ended", lambda why, code=1: said.append((why, code)))
    for error in (MemoryError("8 GB"), RunError("NaN\nmore"), UserError("data: no rows"), Preempted("saved")):
        stand_in("trainer", train=failing(error))
        run("train", "recipe.yaml")
    assert said == [("MemoryError: 8 GB", 1), ("NaN", 1), ("data: no rows", 2)]


def test_a_collective_that_timed_out_names_the_key(stand_in):
    stand_in("trainer", train=failing(RuntimeError("Timed out waiting 1800000ms for recv operation to complete")))
    assert "hangs or took longer than training.ddp_timeout; go on with --resume." in run("train", "recipe.yaml").stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("run: holds a run already"), 2, "run: holds a run already\n"),
        (UserError("one\ntwo"), 2, "one\ntwo\n"),
        (RunError("the loss is NaN at step 3: lower optimizer.learning_rate"), 1,
         "the loss is NaN at step 3: lower optimizer.learning_rate\n"),
        (Preempted("saved run/checkpoints/step_000004; start again with --resume"), 143,
         "saved run/checkpoints/step_000004; start again with --resume\n"),
        (
            KeyboardInterrupt(),
            130,
            "stopped by Ctrl-C; what came after the last checkpoint, if there is one, is not saved\n",
        ),
    ],
)  # fmt: skip
def test_expected_endings_print_their_message_alone(stand_in, error, code, message):
    Path("run").mkdir()
    stand_in("trainer", train=failing(error))
    result = run("train", "recipe.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", message)
    assert list(Path("run").iterdir()) == []


def test_unexpected_exception_leaves_its_traceback_in_the_run_folder(stand_in):
    Path("run").mkdir()
    stand_in("trainer", train=failing(ValueError("seven\nof nine")))
    result = run("train", "recipe.yaml")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert result.stderr.startswith("ValueError: seven. ")
    assert result.stderr.endswith("The traceback is in run/error.txt.\n")
    text = Path("run/error.txt").read_text()
    assert text.startswith("Traceback")
    assert text.endswith("ValueError: seven\nof nine\n")


def test_secrets_are_not_in_the_traceback_that_is_kept(stand_in, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "hunter2-hunter2-hunter2")
    Path("run").mkdir()
    stand_in("trainer", train=failing(ValueError("401 for hunter2-hunter2-hunter2 at postgres://me:hunter3@db/x")))
    run("train", "recipe.yaml")
    text = Path("run/error.txt").read_text()
    assert "401 for " in text
    assert "hunter" not in text


def test_without_a_run_folder_the_traceback_is_printed_before_the_last_line(stand_in):
    stand_in("trainer", train=failing(ValueError("seven")))
    result = run("train", "recipe.yaml")
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-1].startswith("ValueError: seven. ")
    assert not Path("run").exists()


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, which is known by its name so that torch need not be imported."""


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate"), "Lower training.micro_batch_tokens"),
        (OSError(errno.ENOSPC, "No space left on device"), "Free some disk space"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), "Install the package that holds gguf"),
    ],
)
def test_the_last_line_says_what_to_do(stand_in, error, advice):
    stand_in("trainer", train=failing(error))
    assert advice in run("train", "recipe.yaml").stderr.splitlines()[-1]


def test_only_the_first_process_of_a_machine_repeats_user_errors(stand_in, monkeypatch):
    stand_in("trainer", train=failing(UserError("wrong")))
    monkeypatch.setattr("grpo.cli.exit_codes.SECONDS_TO_SPEAK", 0.0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    result = run("train", "recipe.yaml")
    assert (result.exit_code, result.output) == (2, "")
    assert (run("train", "nowhere.yaml").exit_code, result.output) == (2, "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run("train", "recipe.yaml").stderr == "wrong\n"


def test_other_processes_say_who_they_are(stand_in, monkeypatch):
    Path("run").mkdir()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    stand_in("trainer", train=failing(RunError("lost")))
    assert run("train", "recipe.yaml").stderr == "[rank 3] lost\n"
    stand_in("trainer", train=failing(ValueError("seven")))
    assert run("train", "recipe.yaml").stderr.startswith("[rank 3] ValueError: seven. ")
    assert Path("run/error_rank3.txt").read_text().startswith("Traceback")


STEERS = "\x1b]0;owned\x07 \x9b31m \r\x08 \u202eab\u061c \x7f \ud800 naïve 好"
HARMLESS = r"\x1b]0;owned\x07 \x9b31m \r\x08 \u202eab\u061c \x7f \ud800 naïve 好"


@pytest.mark.parametrize("error", [UserError(STEERS), RunError(STEERS), Preempted(STEERS), ValueError(STEERS)])
def test_what_a_model_wrote_cannot_steer_the_terminal(stand_in, error):
    stand_in("trainer", train=failing(error))
    Path("run").mkdir()
    said = run("train", "recipe.yaml").stderr
    first = HARMLESS.partition(r" \r")[0]  # of an unexpected error only the first line is said
    assert (first if isinstance(error, ValueError) else HARMLESS) in said
    trace = Path("run/error.txt")
    for text in (said, trace.read_text() if trace.exists() else ""):
        assert not set("\x1b\x9b\r\x08\x7f\u202e\x07") & set(text)


def test_what_is_logged_or_reported_cannot_steer_the_terminal(stand_in):
    # pytest-xdist can't send a captured log that holds half a surrogate pair
    steers, harmless = STEERS.replace("\ud800", ""), HARMLESS.replace(r"\ud800", "")

    def train(recipe, resume, **_):
        logging.getLogger("grpo.scoring").warning("it said %s", steers)
        logging.getLogger("data.sources").warning("a row says %s", steers)
        try:
            raise ValueError(steers)
        except ValueError:
            logging.getLogger("grpo").exception("and")
        raise UserError("done")

    stand_in("trainer", train=train)
    assert run("train", "recipe.yaml").stderr.count(harmless) == 3
    stand_in("audit.audit", audit=lambda recipe, rows, gold, tell: [tell(steers), steers][1:])
    result = run("audit", "recipe.yaml")
    assert harmless in result.stdout
    assert harmless in result.stderr


def test_a_terminal_that_is_gone_is_no_fault_of_the_run(tmp_path):
    """SIGHUP asks the run to stop; what it prints from then on is refused."""
    script = (
        "import select, signal, sys, typer; from pathlib import Path; from grpo.cli.exit_codes import exit_codes\n"
        "from grpo.errors import Preempted; from grpo.run.screen import LiveBar, open_display\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "display = open_display(3, 0)\n"
        "assert isinstance(display, LiveBar)\n"
        "print('it is ready', flush=True)\n"
        "gone = select.poll(); gone.register(1, 0); gone.poll(20000)\n"
        "try:\n"
        "    with exit_codes(Path('.')):\n"
        "        display.log(1, {'reward': 1.0}); display.log(1, {'eval/accuracy': 1.0}); display.close()\n"
        "        raise Preempted('saved')\n"
        "except typer.Exit as ending: sys.exit(ending.exit_code)\n"
    )
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True,
    )  # fmt: skip
    os.close(its_end)
    said = b""
    while b"it is ready" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert process.wait(60) == 143
    assert not (tmp_path / "error.txt").exists()


def test_output_that_nobody_reads_is_no_fault_of_the_run(tmp_path):
    """`grpo eval run | head`: a finished run gets no error.txt, and a run that trains goes on."""
    script = (
        "import sys, typer; from pathlib import Path; from grpo.cli.exit_codes import exit_codes;"
        "from grpo.run.screen import Eta, PlainLines\n"
        "lines = PlainLines(3, Eta(3, None, 0.0))\n"
        "sys.stdin.read()\n"
        "if sys.argv[1] == 'train': lines.log(1, {'reward': 1.0}); lines.log(2, {'reward': 1.0}); sys.exit(7)\n"
        "try:\n"
        "    with exit_codes(Path('.')): print('accuracy 1', flush=True)\n"
        "except typer.Exit as ending: sys.exit(ending.exit_code)\n"
    )
    for command, code, said in (("eval", 1, ""), ("train", 7, "standard output is closed")):
        process = subprocess.Popen(
            [sys.executable, "-c", script, command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        process.stdout.close()
        process.stdin.close()
        stderr = process.stderr.read()
        assert process.wait(60) == code, stderr
        assert (said in stderr) if said else not stderr
        assert not (tmp_path / "error.txt").exists()
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-c", script, "train"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert process.returncode == 7, process.stderr
    assert process.stderr.count("standard output is closed (No space left on device)") == 1


@pytest.mark.parametrize("arguments", [["recipes"], ["train", "--help"], ["--version"]])
def test_a_full_disk_under_the_output_is_told_in_a_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grpo", *arguments])
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match="1"):
            main()
    assert capsys.readouterr().err == "standard output cannot be written: No space left on device\n"


def test_an_option_that_is_a_key_is_told_what_to_write(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grpo", "train", "recipe.yaml", "--rollout.temperature=0.8"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == "--rollout.temperature=0.8: write rollout.temperature=0.8\n"
    assert run("validate", "recipe.yaml", "rollout.temperature", "0.8").stderr == (
        "rollout.temperature 0.8: write rollout.temperature=0.8\n"
    )


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied", "a\x1b/b"),
                                   OSError(errno.EROFS, "Read-only file system", "a/b"),
                                   OSError(errno.ENAMETOOLONG, "File name too long", "aaa")])  # fmt: skip
def test_a_path_that_this_user_cannot_use_is_told_in_a_line(stand_in, error):
    stand_in("trainer", train=failing(error))
    result = run("train", "recipe.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"{error.filename}: {error.strerror}\n".replace("\x1b", r"\x1b")


def test_a_folder_that_is_gone_is_no_place_to_start_in(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = run("recipes")
    assert result.exit_code == 2
    assert result.stderr == "the folder in which grpo was started is not there any more; cd to one that is\n"
