"""Environments that hang, crash, fork, flood, eat memory: it costs their episode, and the others stay as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo.backends.base import Sampling
from grpo.environments import worlds as worlds_module
from grpo.environments.episodes import Episodes, open_episodes, play
from grpo.environments.living import EpisodeFailed
from grpo.environments.loading import Spec
from grpo.environments.worlds import Worlds
from grpo.errors import RunError
from grpo.types import Completion, Status
from rewards.processes import living_below
from tests.conftest import make_recipe
from tests.environments.playing import ScriptedBackend, by_sample, bytes_tokenizer, calls, request
from tests.launching import ROOT

pytestmark = pytest.mark.slow
PLACE = f"{ROOT}/tests/environments/worlds_for_tests.py:Failing"
TIMEOUT = 1.0
GOOD = (calls("add", number=2), calls("roll"), "done")


@pytest.fixture(scope="module")
def episodes() -> Iterator[Episodes]:
    """One environment for all: what one episode does must not be felt in another."""
    tokenizer = bytes_tokenizer()
    environment = {"path": PLACE, "timeout": TIMEOUT, "memory_limit_gb": 0.25}
    recipe = make_recipe(Path("unused"), environment=environment, rewards=[])
    with open_episodes(recipe, tokenizer, [tokenizer.eos_token_id]) as opened:
        assert opened is not None
        yield opened


def beside_one_that(episodes: Episodes, *turns: str, columns: dict[str, Any] | None = None) -> list[Completion]:
    """Three episodes; the middle one takes these turns, or has a row with these columns."""
    script = by_sample(GOOD, turns or GOOD, GOOD)
    backend = ScriptedBackend(episodes.tokenizer, script)
    asked = [request(episodes.tokenizer, keys=[11]), request(episodes.tokenizer, keys=[12], **(columns or {}))]
    asked.append(request(episodes.tokenizer, keys=[13]))
    backend.script = lambda of, sample, turn, so_far: script(of, {11: 0, 12: 1, 13: 2}[of.keys[0]], turn, so_far)
    groups = play(episodes, backend, asked, Sampling(10_000), 0)
    return [group.completions[0] for group in groups]


@pytest.fixture(scope="module")
def undisturbed(episodes: Episodes) -> list[Completion]:
    return beside_one_that(episodes)


def fails(how: str) -> str:
    return calls("fail", how=how)


COSTLY = [
    ("hang", "timeout", "in hang"),
    ("hang_in_c", "timeout", "no answer after environment.timeout = 1 s"),
    ("ignores_signals", "timeout", "in ignores_signals"),
    ("segfault", "crashed", "SIGSEGV"),
    ("os_exit", "crashed", "exited with status 3"),
    ("sys_exit", "crashed", "SystemExit: enough"),
    ("killed", "crashed", "was killed by SIGKILL"),
    ("kills_its_group", "crashed", "was killed by SIGKILL"),
    ("forks", "crashed or timeout", ""),  # whichever comes first on a busy machine; test_watch.py tells them apart
    ("eats_memory", "memory", "MemoryError"),
    ("children_eat_memory", "memory or timeout", ""),
    ("memory_error", "memory", "by hand"),
]


@pytest.mark.parametrize(("how", "cause", "says"), COSTLY)
def test_it_costs_its_episode_alone(
    episodes: Episodes, undisturbed: list[Completion], how: str, cause: str, says: str
) -> None:
    first, middle, last = beside_one_that(episodes, calls("add", number=1), fails(how), "never")
    assert [first, last] == [undisturbed[0], undisturbed[2]]
    assert middle.status is Status.ERROR
    episode = middle.episode
    assert episode is not None
    assert episode.failure in cause.split(" or ")
    assert episode.reward is None
    assert says in episode.message
    assert len(episode.turns) == 2
    assert (episode.turns[0].calls[0].error, episode.turns[1].calls[0].error) == ("", "lost")


HARMLESS = [
    ("leaves_children", "left"),
    ("forked_answers", ""),
    ("floods", "flooded"),
    ("long_reply", "aaaa"),
    ("odd", "the result cannot be shown: ValueError: no text"),
    ("none", "None"),
    ("number", "7"),
    ("raises", "ValueError: of its own"),
]


@pytest.mark.parametrize(("how", "says"), HARMLESS)
def test_it_is_answered(
    episodes: Episodes, undisturbed: list[Completion], how: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    first, middle, last = beside_one_that(episodes, fails(how), "done")
    assert [first, last] == [undisturbed[0], undisturbed[2]]
    assert (middle.status, middle.episode.failure) == (Status.STOP, "")  # type: ignore[union-attr]
    assert says in middle.episode.turns[0].calls[0].result  # type: ignore[union-attr]
    assert len(middle.episode.turns[0].calls[0].result) < 200_000  # type: ignore[union-attr]
    assert len(capfd.readouterr().err) < 50_000
    assert middle.episode.turns[1].start - middle.episode.turns[0].end <= 256  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("columns", "cause", "says"),
    [
        ({"in_reset": "raises"}, "error", "ValueError: of its own"),
        ({"in_reset": "number"}, "error", "reset returned an int: 7; expected a str or None"),
        ({"in_reset": "os_exit"}, "crashed", "status 3"),
        ({"in_reward": "raises"}, "error", "ValueError: of its own"),
        ({"in_reward": "text"}, "error", "get_reward returned the reward a str: 'said'; expected a finite number"),
        ({"in_reward": "not_a_number"}, "error", "a float: nan; expected a finite number"),
        ({"in_reward": "odd"}, "error", "expected a finite number"),
        ({"in_reward": "hang"}, "timeout", "get_reward: no answer"),
    ],
)
def test_other_methods(
    episodes: Episodes, undisturbed: list[Completion], columns: dict[str, str], cause: str, says: str
) -> None:
    first, middle, last = beside_one_that(episodes, columns=columns)
    assert [first, last] == [undisturbed[0], undisturbed[2]]
    episode = middle.episode
    assert episode is not None
    assert (middle.status, episode.failure) == (Status.ERROR, cause)
    assert says in episode.message
    assert bool(middle.token_ids) == ("in_reward" in columns)


def test_a_reward_of_none_is_no_failure(episodes: Episodes) -> None:
    _, middle, _ = beside_one_that(episodes, columns={"in_reward": "none"})
    assert (middle.status, middle.episode.failure, middle.episode.reward) == (Status.STOP, "", None)  # type: ignore[union-attr]


def test_nothing_is_left_behind(episodes: Episodes) -> None:
    """Children that left the session, too."""
    beside_one_that(episodes, fails("leaves_children"), "done")
    zygote = episodes.worlds.pid
    assert zygote is not None
    deadline = time.monotonic() + 10
    while living_below(zygote) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert living_below(zygote) == []
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "4242"]]


def test_steps_that_return_what_no_game_does() -> None:
    tokenizer = bytes_tokenizer()
    place = f"{ROOT}/tests/environments/worlds_for_tests.py:OddGame"
    with Worlds(Spec("OddGame", place, []), timeout=5.0, memory_gb=0.5) as worlds:
        for what, says in [
            ("five", "step returned a tuple: (1, 2, 3, 4, 5); expected (observation, done) or"),
            ("text", "step returned a str: 'text'"),
            ("number", "the observation an int: 7; expected a str or None"),
            ("undone", "an int: 3 for done, expected a bool"),
            ("unpaid", "the reward a str: 'much'"),
            ("raises", "ValueError: odd"),
        ]:
            world = worlds.open(1)
            world.ask("reset", {})
            with pytest.raises(EpisodeFailed) as why:
                world.ask("step", what).result(10)
            assert why.value.cause == "error"
            assert says in str(why.value)
        world = worlds.open(1)
        world.ask("reset", {})
        assert world.ask("step", "none").result(10) == {"observation": "", "reward": None, "done": False}
    assert tokenizer is not None


def test_a_zygote_that_is_lost_is_started_again_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds_module, "STARTS", 2)
    with Worlds(Spec("Failing", PLACE, []), timeout=5.0, memory_gb=0.5) as worlds:
        world = worlds.open(1)
        assert world.ask("reset", {"says": "hi"}).result(10) == "hi"
        assert worlds.pid is not None
        os.kill(worlds.pid, signal.SIGKILL)
        with pytest.raises(EpisodeFailed, match="has ended with the process that episodes are forked from") as why:
            world.ask("call", [("fail", {"how": "hang"})]).result(10)
        assert why.value.cause == "crashed"
        assert worlds.open(1).ask("reset", {"says": "hi"}).result(10) == "hi"
        os.kill(worlds.pid, signal.SIGKILL)
        while worlds._warden.has_zygote:
            time.sleep(0.01)
        with pytest.raises(RunError, match=r"was killed by SIGKILL.*2 times now"):
            worlds.open(1)


def test_processes_and_their_memory_are_counted_while_a_call_is_under_way() -> None:
    """Long before its time is up."""
    with Worlds(Spec("Failing", PLACE, []), timeout=600.0, memory_gb=0.25) as worlds:
        opened = worlds.open(1), worlds.open(2)
        for world in opened:
            world.ask("reset", {})
        forks = opened[0].ask("call", [("fail", {"how": "forks"})])
        eats = opened[1].ask("call", [("fail", {"how": "children_eat_memory"})])
        with pytest.raises(EpisodeFailed, match="it has started more than 64 processes"):
            forks.result(60)
        with pytest.raises(EpisodeFailed, match=r"its 4 processes take more than environment\.memory_limit_gb"):
            eats.result(60)


def test_many_at_a_time_and_closing_while_they_are_busy() -> None:
    """Forty episodes wait a quarter of a second each, together."""
    worlds = Worlds(Spec("Failing", PLACE, []), timeout=60.0, memory_gb=0.5)
    opened = [worlds.open(i) for i in range(40)]
    said = [world.ask("reset", {"says": str(i)}) for i, world in enumerate(opened)]
    assert [future.result(60) for future in said] == [str(i) for i in range(40)]
    begun = time.monotonic()
    waiting = [world.ask("call", [("wait", {"seconds": 0.25})]) for world in opened]
    assert {future.result(60)[0][0] for future in waiting} == {"waited 0.25"}
    assert time.monotonic() - begun < 5  # one after the other it would be 10
    hanging = opened[0].ask("call", [("fail", {"how": "hang"})])
    zygote, begun = worlds._zygote, time.monotonic()
    assert zygote is not None
    worlds.close()
    worlds.close()
    for late in (hanging, opened[1].ask("call", [("roll", {})])):
        with pytest.raises(EpisodeFailed, match="was ended with the run"):
            late.result(1)
    assert time.monotonic() - begun < 10
    assert zygote.poll() is not None


TRAINER = """
import sys, time
from grpo.environments.loading import Spec
from grpo.environments import worlds as worlds_module
from grpo.environments.worlds import Worlds

worlds = Worlds(Spec("Failing", sys.argv[1], []), timeout=500.0, memory_gb=0.5)
opened = [worlds.open(i) for i in range(4)]
for world in opened:
    world.ask("reset", {}).result(30)
opened[0].ask("call", [("fail", {"how": "leaves_children"})]).result(30)
opened[1].ask("call", [("fail", {"how": "ignores_signals"})])
opened[2].ask("call", [("fail", {"how": "hang_in_c"})])
time.sleep(0.1)
print(worlds._zygote.pid, flush=True)
time.sleep(1000)
"""


def test_a_trainer_that_is_killed_leaves_nothing_behind() -> None:
    """While tools run, one of which has started children in sessions of their own."""
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, PLACE], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert trainer.stdout is not None
    guard = int(trainer.stdout.readline())
    below = [guard, *living_below(guard)]
    assert len(below) >= 2 + 4 * 2 + 2  # guards and their processes, and the children that were left
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 15
    while any(map(lives, below)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, below))


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
