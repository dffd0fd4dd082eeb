"""A user's own ``data``, ``rewards`` and ``recipes`` beside ours: each side imports its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.launching import ROOT, environment


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))


def python(folder: Path, script: str, cwd: str = ".") -> list[str]:
    """Lines that a new process prints which has ``folder`` first on its path, as ``python -m`` has."""
    start = f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom grpo import user_code\nuser_code.import_ours()\n"
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(script)],
        cwd=folder / cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "own",
    [
        {"data.py": "WHO = 'mine'\n"},
        {"data/__init__.py": "WHO = 'mine'\n"},
        {"data/__init__.py": "from data.inner import WHO\n", "data/inner.py": "from .more import WHO\n"}
        | {"data/more.py": "import data\nWHO = 'mine'\n"},
    ],
    ids=["module", "package", "package that imports itself"],
)
def test_the_user_s_code_gets_the_user_s_and_ours_gets_ours(tmp_path, own):
    write(
        tmp_path,
        own
        | {
            "my_loss.py": """
                import data, neighbour
                from data import WHO
                def fn():
                    import data as late
                    return [data.WHO, WHO, late.WHO, neighbour.WHO, neighbour.late()]
            """,
            "neighbour.py": """
                from data import WHO
                def late():
                    from data import WHO
                    return WHO
            """,
        },
    )
    script = """
        print(*user_code.load("my_loss.py:fn")())
        import data.files
        from rewards import countdown
        print(data.__file__, countdown.__file__)
    """
    ours = f"{ROOT}/data/__init__.py {ROOT}/rewards/countdown.py"
    assert python(tmp_path, script) == ["mine mine mine mine mine", ours]


def test_without_one_of_their_own_it_is_ours_and_a_folder_of_rows_is_none(tmp_path):
    write(
        tmp_path,
        {
            "data/rows.jsonl": "{}",
            "rewards/mine.py": "X = 1\n",  # no __init__.py: what is not in there is ours
            "my_reward.py": """
                import data, recipes
                from data import files
                from rewards.mine import X
                from rewards import countdown
                from rewards.countdown import verify
                import rewards.mine as mine, rewards.countdown as same
                def fn(): return [data.__file__, recipes.__file__, countdown.__file__, same is countdown, X, mine.X]
            """,
        },
    )
    ours = [f"{ROOT}/data/__init__.py", f"{ROOT}/recipes/__init__.py", f"{ROOT}/rewards/countdown.py", "True"]
    assert python(tmp_path, 'print(*user_code.load("my_reward.py:fn")())')[0].split() == [*ours, "1", "1"]


def test_a_reward_file_named_rewards_is_one_module_however_it_is_named(tmp_path):
    write(
        tmp_path,
        {
            "rewards.py": "import other\ndef fn(): return other.rewards.fn is fn\n",  # each imports the other
            "other.py": "import rewards\n",
        },
    )
    script = """
        print(user_code.load("rewards.py:fn")())
        print(user_code.load("rewards:fn") is user_code.load("rewards.py:fn"))
        print(user_code.load("other:rewards").fn is user_code.load("rewards.py:fn"))
    """
    assert python(tmp_path, script) == ["True"] * 3


def test_files_that_import_each_other_in_a_circle(tmp_path):
    write(
        tmp_path,
        {"one.py": "import two\ndef fn(): return two.one.fn is fn\n", "two.py": "import one\n"},
    )
    assert python(tmp_path, 'print(user_code.load("one.py:fn")())') == ["True"]


def test_neighbours_of_the_same_name_in_two_folders_are_two(tmp_path):
    for name in "ab":
        write(
            tmp_path / name,
            {
                "helpers.py": f"WHO = {name!r}\n",
                "data.py": f"WHO = {name!r}\n",
                "reward.py": """
                    import helpers, data
                    def fn():
                        import helpers as late
                        return helpers.WHO + late.WHO + data.WHO
                """,
            },
        )
    script = 'print(user_code.load("b/reward.py:fn")(), user_code.load("a/reward.py:fn")())'
    assert python(tmp_path, script) == ["bbb aaa"]


def test_a_file_of_a_package_has_relative_imports_and_what_lies_in_the_working_directory(tmp_path):
    write(
        tmp_path,
        {
            "rewards/__init__.py": "",
            "rewards/judge.py": """
                from . import helpers
                from .helpers import ONE
                from rewards.helpers import ONE as absolute
                from beside import TWO
                from common import THREE
                import rewards.helpers
                def fn(): return ONE, absolute, TWO, THREE, rewards.helpers is helpers, __name__.startswith("_user_")
            """,
            "rewards/helpers.py": "ONE = 1\n",
            "rewards/beside.py": "TWO = 2\n",
            "common.py": "import data\nTHREE = data.THREE\n",
            "data.py": "THREE = 3\n",
        },
    )
    assert python(tmp_path, 'print(*user_code.load("rewards/judge.py:fn")())') == ["1 1 2 3 True True"]


def test_what_lies_beside_a_file_shadows_nothing(tmp_path):
    write(tmp_path / "mine", {"json.py": "raise SystemExit('shadowed')", "my_loss.py": "import json\nfn = json.loads"})
    assert python(tmp_path, 'print(user_code.load("mine/my_loss.py:fn")("[1]"))') == ["[1]"]


def test_the_user_s_functions_have_all_other_builtins_and_can_be_compiled(tmp_path):
    write(
        tmp_path,
        {
            "my_loss.py": """
                import dataclasses, pickle
                @dataclasses.dataclass
                class Pair:
                    one: int = 1
                def fn():
                    scope = {}
                    exec("import data; who = data.__file__", globals(), scope)
                    return eval("len([1, 2])"), pickle.loads(pickle.dumps(Pair())) == Pair(), scope["who"]
            """,
            "data.py": "",
        },
    )
    assert python(tmp_path, 'print(*user_code.load("my_loss.py:fn")())') == [f"2 True {tmp_path}/data.py"]


def test_an_installation_without_our_packages_is_said(tmp_path):
    write(tmp_path, {"data.py": ""})
    script = """
        import sys
        for name in ("data", "rewards", "recipes"):
            del sys.modules[name]
        user_code.imports.ROOT = __import__("pathlib").Path("/nowhere")
        try:
            user_code.import_ours()
        except user_code.UserError as error:
            print(error)
    """
    assert python(tmp_path, script) == ["grpo's own package `data` is not in /nowhere: install grpo again"]
