"""The section `environment`: a call's time limit holds what a built-in's own asks for."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from grpo.config import EnvironmentConfig


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"name": "calculator"}, 10.0),
        ({"path": "my_env.py:Env", "args": {"timeout": 50.0}}, 10.0),
        ({"name": "python"}, 10.0),
        ({"name": "python", "args": {"timeout": 20.0}}, 22.0),
        ({"name": "tests"}, 26.0),
        ({"name": "tests", "args": {"timeout": 1}}, 10.0),
        ({"name": "tests", "args": {"timeout": "soon"}}, 10.0),  # the constructor says what is wrong
        ({"name": "tests", "timeout": 26.0}, 26.0),
        ({"name": "tests", "timeout": 60.0}, 60.0),
    ],
)
def test_a_call_has_the_time_that_a_built_in_may_take(environment: dict, seconds: float) -> None:
    assert EnvironmentConfig.model_validate(environment).timeout == seconds


@pytest.mark.parametrize("environment", [{"name": "tests"}, {"name": "python", "args": {"timeout": 9.0}}])
def test_a_shorter_one_is_refused(environment: dict) -> None:
    with pytest.raises(ValidationError, match=r"a call of (tests|python) may take (26|11) s, by its args.timeout"):
        EnvironmentConfig.model_validate(environment | {"timeout": 10.0})
