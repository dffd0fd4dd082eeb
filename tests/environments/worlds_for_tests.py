"""Environments that tests play: a game, tools, and every way to fail. ``test_worlds.py`` says what each is for."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np


class Failing:
    """A tools environment whose methods do what they are told by the row or by the model."""

    def __init__(self, start: int = 0):
        self.total = start
        self.rolls: list[int] = []

    def reset(self, **row: Any) -> str | None:
        self.do = row.get("in_reward", "")
        if "in_reset" in row:
            return _do(row["in_reset"])
        return row.get("says")

    def add(self, number: int) -> int:
        """Add a number to the total.

        Args:
            number: What to add.

        Returns:
            The total.
        """
        self.total += number
        return self.total

    def roll(self) -> str:
        """Roll three dice."""
        self.rolls.append(random.randint(1, 10**9))
        return f"{self.rolls[-1]} {np.random.randint(1, 10**9)} {hash('text')}"

    def fail(self, how: str) -> Any:
        """Fail.

        Args:
            how: The way to fail.
        """
        return _do(how)

    async def wait(self, seconds: float) -> str:
        """Wait.

        Args:
            seconds: How long.
        """
        await asyncio.sleep(seconds)
        return f"waited {seconds}"

    def get_reward(self) -> Any:
        return _do(self.do) if self.do else float(self.total)


def _do(how: str) -> Any:
    return getattr(Ways, how)()


class Odd:
    def __str__(self) -> str:
        raise ValueError("no text")

    def __reduce__(self) -> Any:
        raise TypeError("no pickle")


class Ways:
    """Ways to fail."""

    @staticmethod
    def hang() -> None:
        time.sleep(1000)

    @staticmethod
    def hang_in_c() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        ctypes.PyDLL(None).sleep(1000)  # holds the interpreter

    @staticmethod
    def ignores_signals() -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(0.1)

    @staticmethod
    def raises() -> None:
        raise ValueError("of its own")

    @staticmethod
    def segfault() -> None:
        ctypes.string_at(0)

    @staticmethod
    def os_exit() -> None:
        os._exit(3)

    @staticmethod
    def sys_exit() -> None:
        sys.exit("enough")

    @staticmethod
    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def kills_its_group() -> None:
        os.killpg(0, signal.SIGKILL)

    @staticmethod
    def forks() -> None:
        while True:
            if os.fork() == 0:
                time.sleep(1000)
            time.sleep(0.002)

    @staticmethod
    def leaves_children() -> str:
        """A child that has left the session, and one that has been left by its parent."""
        subprocess.Popen(["sleep", "4242"], start_new_session=True)
        if os.fork() == 0:
            if os.fork() == 0:
                os.setsid()
                os.execvp("sleep", ["sleep", "4242"])
            os._exit(0)
        return "left"

    @staticmethod
    def forked_answers() -> str:
        """Parent and child both return."""
        os.fork()
        return str(os.getpid())

    @staticmethod
    def floods() -> str:
        line = "x" * 10000 + "\n"
        for _ in range(2000):
            sys.stdout.write(line)
            sys.stderr.write(line)
        os.write(1, b"y" * 5_000_000)
        return "flooded"

    @staticmethod
    def eats_memory() -> None:
        kept = []
        while True:
            kept.append(bytearray(1 << 24))

    @staticmethod
    def children_eat_memory() -> None:
        for _ in range(3):
            if os.fork() == 0:
                kept = bytearray(os.urandom(1) * (95 << 20))
                time.sleep(1000)
                print(kept[:1])
        time.sleep(1000)

    @staticmethod
    def long_reply() -> str:
        return "a" * 40_000_000 + "b"

    @staticmethod
    def odd() -> Any:
        return Odd()

    @staticmethod
    def none() -> None:
        return None

    @staticmethod
    def number() -> Any:
        return 7

    @staticmethod
    def not_a_number() -> Any:
        return float("nan")

    @staticmethod
    def text() -> str:
        return "said"

    @staticmethod
    def memory_error() -> None:
        raise MemoryError("by hand")


class Game:
    """Ends after so many steps, and pays the length of what is said."""

    def __init__(self, steps: int = 2) -> None:
        self.left = steps

    def reset(self, prompt: str, said: str = "") -> None:
        assert prompt == "ask"

    async def step(self, text: str) -> tuple[str, float, bool]:
        self.left -= 1
        await asyncio.sleep(0)
        return f"heard {text}", float(len(text)), self.left == 0


class OddGame:
    """Its steps return what they are told to."""

    def reset(self) -> None:
        """Nothing."""

    def step(self, text: str) -> Any:
        if text == "raises":
            raise ValueError("odd")
        return {
            "five": (1, 2, 3, 4, 5),
            "number": (7, False),
            "undone": ("x", 3),
            "unpaid": ("x", "much", False),
            "none": (None, False),
        }.get(text, text)


class Counts:
    """Says how many turns there were, three times, and pays for small digits, a turn at a time."""

    def reset(self, **row: Any) -> None:
        self.turns = 0

    def step(self, text: str) -> tuple[str, float, bool]:
        self.turns += 1
        return f" {self.turns} ", sum(c in "0123" for c in text) / max(1, len(text)), self.turns == 3


class Draws:
    """Its prompt depends on a draw."""

    def reset(self, **row: Any) -> str:
        return [" even 2", " odd 1"][random.randint(0, 9) % 2]

    def step(self, text: str) -> tuple[None, bool]:
        return None, True


def shout(text: str) -> str:
    """Shout.

    Args:
        text: What.
    """
    return f"{text.upper()}!"


async def later(text: str) -> str:
    """Say it later.

    Args:
        text: What.
    """
    await asyncio.sleep(0.01)
    return f"{text} later"
