"""The adapter for OpenEnv servers, against a server of the real package. Skipped where that is not installed."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from grpo.environments.openenv import OpenEnv

pytest.importorskip("openenv", reason="needs the extra openenv")


@pytest.fixture(scope="module")
def url():
    import uvicorn
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

    class Say(Action):
        message: str
        loud: bool = False

    class Heard(Observation):
        text: str
        turns: int = 0

    class Counting(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, **kwargs):
            self.turns, self.seed = 0, seed
            return Heard(text=f"say something ({seed})")

        def step(self, action, **kwargs):
            self.turns += 1
            text = action.message.upper() if action.loud else action.message
            return Heard(text=text, turns=self.turns, done=self.turns == 2, reward=0.5)

        @property
        def state(self):
            return State(step_count=self.turns)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_fastapi_app(Counting, Say, Heard, max_concurrent_envs=8)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(5)


def test_an_episode_of_a_server_is_a_game(url):
    one = OpenEnv(base_url=url, with_action={"loud": True}, observation="text", reset_with=["seed"])
    other = OpenEnv(base_url=url)
    assert one.reset(seed=7, prompt="…") == "say something (7)"
    assert other.reset(seed=7) == '{"text": "say something (None)", "turns": 0}'
    assert one.step("hi") == ("HI", 0.5, False)
    assert one.step("ho") == ("HO", 0.5, True)
    assert other.step("hi") == ('{"text": "hi", "turns": 1}', 0.5, False)


def test_what_does_not_fit_is_told(url):
    with pytest.raises(ValueError, match="reset_with: the row has no column 'seed', but prompt"):
        OpenEnv(base_url=url, reset_with=["seed"]).reset(prompt="…")
    with pytest.raises(KeyError, match="the server observes no 'txt', but text, turns"):
        OpenEnv(base_url=url, observation="txt").reset()
    with pytest.raises(ConnectionError):
        OpenEnv(base_url="http://127.0.0.1:9")


def test_a_server_that_has_no_room_says_so(url):
    games = [OpenEnv(base_url=url) for _ in range(12)]  # others are still open
    with pytest.raises(ConnectionError, match="as many at a time as a step has completions"):
        print([game.reset() for game in games])
