"""Every built-in environment in an episode's process, as a run has it."""

from __future__ import annotations

from importlib import import_module
from inspect import signature

import pytest

from data import number_guess, wordle
from grpo.config import EnvironmentConfig
from grpo.config.environment import ENVIRONMENTS, SECONDS_OF_A_CALL
from grpo.environments.find import BUILT_IN, spec_of
from grpo.environments.worlds import Worlds

PROGRAM = "def add(a, b):\n    return a + b"
TESTS = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}
ROWS = {
    "calculator": {"prompt": "…", "answer": "42"},
    "number_guess": number_guess.rows("eval", 1)[0],
    "python": {"prompt": "…", "answer": "42"},
    "tests": {"prompt": "…", "tests": TESTS, "solution": PROGRAM},
    "wordle": wordle.rows("eval", 1)[0],
}
CALLS = {
    "calculator": (
        [("calculate", {"expression": "6 * 7"}), ("calculate", {"expression": "1 / 0"})],
        ["42", "division"],
    ),
    "python": ([("python", {"code": "x = 6"}), ("python", {"code": "x * 7"})], ["(no output)", "42"]),
    "tests": ([("run_tests", {"code": PROGRAM})], ["All 1 public tests passed."]),
}


def test_the_list_of_the_recipe_is_the_list_of_modules():
    assert tuple(sorted(BUILT_IN)) == ENVIRONMENTS == tuple(ROWS)
    assert all(
        hasattr(import_module(f"grpo.environments.{name}"), "play") for name in ("number_guess", "tests", "wordle")
    )


def test_the_time_limits_that_the_recipe_knows_are_those_of_the_classes():
    for name, place in BUILT_IN.items():
        module, kind = place.split(":")
        limit = signature(getattr(import_module(module), kind)).parameters.get("timeout")
        assert SECONDS_OF_A_CALL.get(name, (0, None))[1] == (limit.default if limit else None), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_it_answers_and_pays_in_a_process_of_its_own(name):
    config = EnvironmentConfig(name=name)
    with Worlds(spec_of(config), timeout=config.timeout, memory_gb=config.memory_limit_gb) as worlds:
        world = worlds.open(0)
        assert world.ask("reset", ROWS[name]).result() is None
        if worlds.about.game:
            play = import_module(f"grpo.environments.{name}").play
            said = [world.ask("step", turn).result() for turn in play(ROWS[name])]
            assert said[-1]["done"]
        else:
            calls, expected = CALLS[name]
            answers = world.ask("call", calls).result()
            assert all(words in text for (text, _), words in zip(answers, expected, strict=True))
        paid = world.ask("get_reward").result()
        assert paid == (1.0 if worlds.about.pays else None)
        world.close()
