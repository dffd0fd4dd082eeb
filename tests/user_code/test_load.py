"""What a person reads where code of theirs cannot be loaded: the file, the line and the cause, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo import user_code
from grpo.errors import RunError, UserError

FILES = {
    "fine.py": "import neighbour\ndef fn(x): return neighbour.N\nlimit = None\nclass Thing: ...\n",
    "neighbour.py": "N = 3\n",
    "syntax.py": "x = 1\ndef fn(:\n",
    "unknown.py": "import nothing_like_this\n",
    "raises.py": "x = 1\n1 / 0\n",
    "quits.py": "import sys\n\nsys.exit('bye')\n",
    "bad_neighbour.py": "import broken\n",
    "broken.py": "x = 1\ny = undefined\n",
    "bad_syntax_beside.py": "import syntax\n",
    "in_a_library.py": "import json\n\njson.loads('{')\n",
    "not_ours.py": "from data import nothing_like_this\n",
    "with space.py": "def fn(): return 'space'\n",
    "two.dots.py": "def fn(): return 'dots'\n",
    "prints.py": "print('hello')\ndef fn(): return 1\n",
}

SAID = {
    "syntax.py:fn": r"{}/syntax.py:2: SyntaxError: invalid syntax",
    "unknown.py:fn": r"{}/unknown.py:1: ModuleNotFoundError: No module named 'nothing_like_this'",
    "raises.py:fn": r"{}/raises.py:2: ZeroDivisionError: division by zero",
    "quits.py:fn": r"{}/quits.py:3: SystemExit: bye",
    "bad_neighbour.py:fn": r"{}/broken.py:2: NameError: name 'undefined' is not defined",
    "bad_syntax_beside.py:fn": r"{}/syntax.py:2: SyntaxError: invalid syntax",
    "in_a_library.py:fn": r"{}/in_a_library.py:3: json.decoder.JSONDecodeError: Expecting property name .*",
    "not_ours.py:fn": r"{}/not_ours.py:1: ImportError: cannot import name 'nothing_like_this' from 'data' .*",
    "fine.py:limits": r"fine.py has no 'limits'; did you mean limit\?",
    "fine.py:zzz": r"fine.py has no 'zzz' \(it has: fn, Thing\)",
    "fin.py:fn": r"there is no file {}/fin.py; did you mean fine.py\?",
    "./fine:fn": r"there is no file {}/fine; did you mean fine.py\?",
    "absent/fine.py:fn": r"there is no file {}/absent/fine.py",
    "no_such_package.module:fn": r"ModuleNotFoundError: No module named 'no_such_package'",
    "rewards.countdwn:fn": r"ModuleNotFoundError: No module named 'rewards.countdwn'",
    "fine.py:": r"expected file.py:name or package.module:name, got 'fine.py:'",
    ":fn": r"expected file.py:name or package.module:name, got ':fn'",
    "fine.py:1fn": r"expected file.py:name or package.module:name, got 'fine.py:1fn'",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", SAID)
def test_why_it_cannot_be_loaded_in_one_line(folder, place):
    with pytest.raises(UserError, match=rf"^key: {SAID[place].format(folder)}$"):
        user_code.load(place, "key")


def test_files_are_found_by_path_by_home_and_by_module(folder, monkeypatch):
    assert user_code.load("fine.py:fn")(0) == 3
    assert user_code.load(f"{folder}/fine.py:fn") is user_code.load("./fine.py:fn")
    assert user_code.load("fine.py:limit") is None
    assert user_code.load("with space.py:fn")() == "space"
    assert user_code.load("two.dots.py:fn")() == "dots"
    monkeypatch.setenv("HOME", str(folder))
    assert user_code.load("~/fine.py:fn") is user_code.load("fine.py:fn")
    assert user_code.load("rewards.countdown:countdown_reward").__module__ == "rewards.countdown"


def test_a_file_is_executed_once_and_may_print(folder, capsys):
    assert user_code.load("prints.py:fn") is user_code.load("prints.py:fn")
    assert capsys.readouterr().out == "hello\n"


def test_a_mistake_is_the_user_s_at_the_first_call_and_the_run_s_later(folder):
    (folder / "late.py").write_text("def fn(x):\n    return [1, 2][x]\n")
    fn = user_code.load("late.py:fn")
    calls = user_code.Calls("key: late.py:fn")
    with pytest.raises(UserError, match=rf"^key: late.py:fn: {folder}/late.py:2: IndexError: list index out of range$"):
        watched(calls, fn, 2)
    watched(calls, fn, 1)
    with pytest.raises(RunError, match=r"late.py:2: IndexError"):
        watched(calls, fn, 2)


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("can't allocate memory"), RunError("known")])
def test_want_of_memory_and_errors_for_people_pass(error):
    def raise_it(_):
        raise error

    with pytest.raises(type(error)) as caught:
        watched(user_code.Calls("key"), raise_it, 0)
    assert caught.value is error


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda tokens: 0, r"key takes \(tokens\); it is called with \(tokens, options\)"),
        (lambda tokens, options, *, more: 0, r"key takes \(tokens, options, \*, more\); it is called with .*"),
        (None, r"key is None; expected a function of \(tokens, options\)"),
    ],
)
def test_a_function_that_takes_other_arguments(function, said):
    with pytest.raises(UserError, match=f"^{said}$"):
        user_code.must_take(function, ("tokens", "options"), "key")
    user_code.must_take(lambda *arguments: 0, ("tokens", "options"), "key")


def watched(calls: user_code.Calls, function, argument):
    with calls.call():
        return function(argument)


def test_the_source_is_the_standard_library_s_alone():
    for file in Path(user_code.__file__).parent.glob("*.py"):
        assert not {"torch", "numpy", "pydantic"} & set(file.read_text().split())
