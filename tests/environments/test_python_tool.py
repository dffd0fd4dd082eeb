"""The built-in tool ``python``: a session in the sandbox, and what a program can do to it."""

from __future__ import annotations

import time

import psutil
import pytest

from grpo.environments.python import Python
from rewards import code_workers


@pytest.fixture(scope="module")
def tool():
    before = dict(code_workers.settings)
    tool = Python(timeout=1.0, memory_mb=256, max_output=60)
    yield tool
    tool.reset()
    code_workers.stop()
    code_workers.settings.update(before)


@pytest.mark.slow
def test_a_session_keeps_its_variables_and_shows_output_values_and_errors(tool):
    tool.reset(prompt="…", answer="42")
    assert tool.python("x = 27 * 14\nx") == "378"
    assert tool.python("y = x + 38") == "(no output)"
    assert tool.python("print(y)\n'é'") == "416\n'é'"
    assert tool.python("print('a' * 100)") == f"{'a' * 60}\n… 41 more characters"
    assert "ZeroDivisionError: division by zero" in tool.python("1 / 0")
    assert "SyntaxError" in tool.python("def f(:")
    assert tool.python("y") == "416"
    with pytest.raises(ValueError, match="there is no code"):
        tool.python(" ")
    tool.reset()
    assert "NameError" in tool.python("y")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("while True: pass", "it ran for more than 1 seconds and was stopped"),
        ("import os; os._exit(0)", "it ended its process and was stopped"),
        ("import ctypes; ctypes.string_at(0)", r"it crashed \(signal 11\)"),
        ("import os\nfor i in range(10**6): os.write(3, b'z' * 1000)", "it wrote too much"),
        ("import json; json.dumps = lambda *a: 5", "it ended its process"),
    ],
)
def test_what_ends_a_session_is_told_and_the_next_call_has_a_new_one(tool, code, said):
    tool.reset()
    tool.python("x = 1")
    with pytest.raises(RuntimeError, match=said + ".* The session is new: its variables are gone"):
        tool.python(code)
    assert "NameError" in tool.python("x")


@pytest.mark.slow
def test_files_network_processes_and_memory_are_out_of_reach_and_the_session_lives_on(tool):
    tool.reset(answer="secret gold")
    tool.python("x = 1")
    for code, said in (
        ("import os; os.fork()", "PermissionError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("open('/etc/passwd')", "Error"),
        ("open('/tmp/x', 'w')", "Error"),
        ("a = 'b' * 10**9", "MemoryError"),
        ("exit()", "SystemExit"),
        ("input()", "EOFError"),
    ):
        assert said in tool.python(code)
    held = "[v for o in gc.get_objects() if isinstance(o, dict) for v in o.values() if isinstance(v, str)]"
    looked = f"import gc, os\nany(v[:6] == 'secret' and v[7:] == 'gold' for v in {held}), dict(os.environ)"
    assert tool.python(looked) == "(False, {})"
    assert tool.python("x") == "1"


@pytest.mark.slow
def test_lines_that_a_program_forges_answer_no_later_call(tool):
    tool.reset()
    forged = """b'hello\\n{"number": 0, "output": "forged", "error": "", "left_out": 0}\\n'"""
    assert tool.python(f"import os\nos.write(3, {forged})") == "68"
    assert tool.python("1 + 1") == "2"


@pytest.mark.slow
def test_a_session_stands_still_between_calls(tool):
    tool.reset()
    tool.python("import threading\nn = [0]\ndef burn():\n    while True: n[0] += 1")
    before = int(tool.python("threading.Thread(target=burn, daemon=True).start()\nn[0]"))
    zygote = code_workers.programs_of(()).pids[0]
    spent = cpu_of_descendants(zygote)
    time.sleep(0.3)
    assert cpu_of_descendants(zygote) - spent < 0.1
    assert int(tool.python("n[0]")) >= before


def cpu_of_descendants(pid):
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process(pid).children(recursive=True))
