"""What is wrong with an environment is told before the run, with file and line, and found in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from grpo.config import EnvironmentConfig
from grpo.environments.episodes import Episodes, open_episodes
from grpo.environments.find import spec_of
from grpo.environments.loading import Loaded, Spec
from grpo.environments.worlds import Worlds
from grpo.errors import UserError
from tests.conftest import make_recipe
from tests.environments.chat_templates import LLAMA, QWEN
from tests.environments.mistakes import RAISES, WRONG, line_of
from tests.environments.playing import bytes_tokenizer
from tests.launching import ROOT


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("wrong") / "wrong.py"
    file.write_text(WRONG)
    return file


def opened(spec: Spec) -> Any:
    """As the process of an episode does it."""
    return Loaded(spec).try_out()


def in_a_process(spec: Spec, timeout: float = 5.0) -> Any:
    with Worlds(spec, timeout=timeout, memory_gb=1.0) as worlds:
        return worlds.about


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("Nothing", {}, ["environment.path: ", "has no 'Nothing'"]),
        ("NoRest", {}, ["did you mean NoReset?"]),
        ("THING", {}, ["is an int: 7; expected a class"]),
        (
            "NoReset",
            {},
            ["NoReset has no reset; an environment has reset(**row)", f"wrong.py:{line_of('class NoReset:')}: "],
        ),
        ("NoTools", {}, ["NoTools has neither a step(text) nor a public method"]),
        (
            "Raises",
            {},
            [
                "its constructor: ",
                f"wrong.py:{RAISES}: OSError: no such index",
            ],
        ),
        ("Exits", {}, ["its constructor: ", "SystemExit: 1"]),
        ("Good", {"sise": 1}, ["environment.args: ", "unexpected keyword argument 'sise'", "it takes: size: int = 3"]),
        (
            "TwoArguments",
            {},
            [
                "TwoArguments.get_reward takes (scale); it is called with ()\n",
                "TwoArguments.step takes (text, image); it is called with (text)",
            ],
        ),
        ("make", {}, ["environment.args: ", "missing a required argument: 'size'", "name it in environment.tools"]),
        ("NoText", {}, ["NoText.step takes (); it is called with (text)"]),
        ("Grid", {}, ["step gets a turn's text alone, never count: give a tool another name than step"]),
        ("Both", {}, ["it has a step, which gets every turn, so look would be no tools: "]),
    ],
)
def test_mistakes(wrong: Path, name: str, args: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UserError) as why:
        opened(Spec(f"wrong.py:{name}", f"{wrong}:{name}", [], args))
    for part in says:
        assert part in str(why.value)


def test_all_mistakes_of_tools_at_once(wrong: Path) -> None:
    tools = [f"{wrong}:tool", f"{wrong}:THING", f"{wrong}:Good"]
    with pytest.raises(UserError) as why:
        opened(Spec("wrong.py:NoDocs", f"{wrong}:NoDocs", tools))
    lines = str(why.value).splitlines()
    assert len(lines) == 4
    assert "environment.tools[1]" in lines[0]
    assert "expected a function" in lines[0]
    find, search = line_of("    def find(self, query) -> str:"), line_of("    def search(self, query: str) -> str:")
    assert f"wrong.py:{find}: NoDocs.find: argument 'query' has no type hint" in lines[2]
    assert f"wrong.py:{search}: NoDocs.search: it has no docstring" in lines[3]


def test_a_tool_and_a_method_of_one_name_and_a_game_with_tools(wrong: Path) -> None:
    with pytest.raises(UserError, match="the environment has a method of that name too"):
        opened(Spec("Good", f"{wrong}:Good", [f"{wrong}:tool"]))
    with pytest.raises(UserError, match="has a step, which gets every turn; it has no tools"):
        opened(Spec("Game", f"{wrong}:Game", [f"{wrong}:tool"]))


def test_a_constructor_that_hangs(wrong: Path) -> None:
    with pytest.raises(UserError, match=r"its constructor: .*no answer after environment.timeout = 0.5 s"):
        in_a_process(Spec("wrong.py:Hangs", f"{wrong}:Hangs", []), timeout=0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import nothing_there", "broken.py:1: ModuleNotFoundError"),
        ("x = 1\nraise SystemExit(3)", "broken.py:2: SystemExit: 3"),
        ("def f(:", "broken.py:1: SyntaxError"),
    ],
)
def test_a_file_that_does_not_import(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(UserError) as why:
        opened(Spec("broken.py:Env", f"{file}:Env", []))
    assert says in str(why.value)


def test_a_sandbox_that_cannot_be_had_is_said_at_start() -> None:
    config = EnvironmentConfig(name="python", args={"packages": ["no_such_package"]})
    with pytest.raises(UserError, match=r"environment\.name: .*no_such_package"):
        Worlds(spec_of(config), timeout=10.0, memory_gb=1.0)


def test_the_same_through_a_process(wrong: Path, tmp_path: Path) -> None:
    for name in ("Nothing", "NoReset", "Raises"):
        with pytest.raises(UserError) as here:
            opened(Spec("wrong.py:Env", f"{wrong}:{name}", []))
        with pytest.raises(UserError) as there:
            in_a_process(Spec("wrong.py:Env", f"{wrong}:{name}", []))
        assert str(here.value) == str(there.value)
    (file := tmp_path / "exits.py").write_text("import os\nos._exit(5)")
    with pytest.raises(UserError, match="the process that imports it exited with status 5"):
        in_a_process(Spec("exits.py:Env", f"{file}:Env", []))


def test_what_an_environment_is(wrong: Path) -> None:
    good = opened(Spec("Good", f"{wrong}:Good", [], {"size": 2, "name": "y"}))
    assert (good.game, good.pays, [tool["function"]["name"] for tool in good.tools]) == (False, False, ["tool"])
    made = opened(Spec("make", f"{wrong}:make", [], {"size": 2}))
    assert made == good
    game = opened(Spec("Game", f"{wrong}:Game", []))
    assert (game.game, game.tools, game.needs) == (True, [], ["word"])


PAID = {"rewards": [{"name": "countdown"}]}


def fitted(recipe: Any, tokenizer: Any) -> Episodes:
    """The environment of a recipe without its processes."""
    about = Loaded(spec_of(recipe.environment)).try_out()
    return Episodes(recipe, tokenizer, [], SimpleNamespace(about=about))  # type: ignore[arg-type]


def recipe_of(environment: dict[str, Any], **sections: Any) -> Any:
    return make_recipe(Path("unused"), environment=environment, **({"rewards": []} | sections))


@pytest.mark.parametrize(
    ("environment", "sections", "template", "says"),
    [
        ({"path": "Good"}, {}, None, "rewards: environment is what the environment pays"),
        ({"path": "Good", "max_observation_length": 5}, PAID, None, "environment.max_observation_length: 5 tokens"),
        ({"path": "Good", "tool_format": "python"}, PAID, None, "environment.tool_format: python runs every block"),
        ({"path": "there.py:Env"}, {}, None, "environment.path: there is no file"),
        ({"tools": ["there.py:tool"]}, {}, None, "environment.tools[0]: there is no file"),
        ({"path": "Good"}, PAID | {"data": {"template": "chat"}}, "{{ raise_exception('no') }}", "data.template: "),
    ],
)
def test_what_does_not_fit_the_recipe(
    wrong: Path, environment: dict[str, Any], sections: dict[str, Any], template: str | None, says: str
) -> None:
    environment = {k: v if v != "Good" else f"{wrong}:Good" for k, v in environment.items()}
    tokenizer = bytes_tokenizer(template)
    with pytest.raises(UserError) as why:
        fitted(recipe_of(environment, **sections), tokenizer)
    assert says in str(why.value)


@pytest.mark.parametrize("form", ["hermes", "llama", "python"])
def test_a_tokenizer_that_cannot_write_a_call(wrong: Path, form: str) -> None:
    """The tiny model's has few words, and puts spaces between them."""
    recipe = recipe_of({"path": f"{wrong}:Says", "tool_format": form}, **PAID)
    with pytest.raises(UserError, match=r"with this tokenizer no tool can be called: .* Take another model"):
        fitted(recipe, AutoTokenizer.from_pretrained(ROOT / "data/tiny_base"))
    fitted(recipe, bytes_tokenizer())


def test_columns_that_reset_needs(wrong: Path) -> None:
    episodes = fitted(recipe_of({"path": f"{wrong}:Game"}), bytes_tokenizer())
    episodes.check_columns({"": ["word"]})
    with pytest.raises(UserError, match=r"environment: reset needs word: no column of the rows \(prompt, wrod\)"):
        episodes.check_columns({"": ["wrod"]})


@pytest.mark.parametrize(("template", "form"), [(QWEN, "hermes"), (LLAMA, "llama"), (None, "hermes")])
def test_the_format_is_the_chat_templates(wrong: Path, template: str | None, form: str) -> None:
    data = {"template": "chat" if template else "none"}
    recipe = recipe_of({"path": f"{wrong}:Good"}, data=data, rewards=[{"name": "countdown"}])
    assert fitted(recipe, bytes_tokenizer(template)).form == form


def test_without_an_environment_nothing_is_opened() -> None:
    with open_episodes(make_recipe(Path("unused")), None, []) as episodes:
        assert episodes is None


def test_secrets_stay_outside_and_some_are_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_API_KEY", "letmein")
    monkeypatch.setenv("OTHER_API_KEY", "hidden")
    file = tmp_path / "env.py"
    file.write_text(
        "import os\n\nclass Env:\n    def reset(self, **row):\n"
        "        return f\"{os.environ.get('SEARCH_API_KEY')} {os.environ.get('OTHER_API_KEY')}\"\n\n"
        "    def step(self, text):\n        return None, True\n"
    )
    recipe = recipe_of({"path": f"{file}:Env"}, scoring={"environment": ["SEARCH_API_KEY"]})
    with open_episodes(recipe, bytes_tokenizer(), []) as episodes:
        assert episodes is not None
        assert episodes.worlds.open(1).ask("reset", {}).result(10) == "letmein None"


def test_the_zygote_imports_no_torch() -> None:
    """Its modules, and so the process of every episode, stand on the standard library."""
    heavy = ("torch", "transformers", "pydantic")
    code = f"import sys, grpo.environments.zygote; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert found.stdout.strip() == "[]"
