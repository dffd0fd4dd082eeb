"""Environments and tools with a mistake each, as the text of a user's file."""

from __future__ import annotations

WRONG = '''
"""Environments with mistakes."""

def tool(a: int) -> int:
    """A tool.

    Args:
        a: A number.
    """
    return a


class NoReset:
    def tool(self) -> None:
        """Nothing."""


class NoTools:
    def reset(self, **row):
        pass


class NoDocs:
    def reset(self, **row):
        pass

    def search(self, query: str) -> str:
        return query

    def find(self, query) -> str:
        """Find.

        Args:
            query: What.
        """
        return query


class Raises:
    def __init__(self):
        raise OSError("no such index")

    def reset(self, **row):
        pass


class Exits(Raises):
    def __init__(self):
        raise SystemExit(1)


class Hangs(Raises):
    def __init__(self):
        while True:
            pass


class Good:
    def __init__(self, size: int = 3, *, name: str = "x"):
        self.size = size

    def reset(self, **row):
        pass

    def tool(self, a: int) -> int:
        """A tool.

        Args:
            a: A number.
        """
        return a


class Game:
    def reset(self, word, length=5):
        pass

    def step(self, text):
        return None, True


class TwoArguments(Game):
    def step(self, text, image):
        return None, True

    def get_reward(self, scale):
        return scale


class Says:
    def reset(self):
        pass

    def say(self, text: str) -> str:
        """Say something.

        Args:
            text: What.
        """
        return text


class NoText(Game):
    def step(self):
        return None, True


class Grid(Game):
    def step(self, direction: str, count: int = 1) -> str:
        """Go.

        Args:
            direction: Where to.
            count: How far.
        """
        return ""


class Both(Game):
    def look(self, at: str) -> str:
        """Look at something.

        Args:
            at: What.
        """
        return at

    def helper(self, at):
        return at


def make(size: int) -> Good:
    return Good(size)


THING = 7
'''


def line_of(text: str) -> int:
    return WRONG.splitlines().index(text) + 1


RAISES = line_of('        raise OSError("no such index")')
