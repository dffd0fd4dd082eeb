"""Text that never reaches the computer algebra system, even where it would be right."""

from __future__ import annotations

import re

from rewards.math.text_errors import Unreadable

COMMAND = re.compile(r"\\([A-Za-z]+)\s*")
_GREEK = """
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau
upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar
"""
GREEK = frozenset(_GREEK.split())
TRIGONOMETRIC = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh")
)
FUNCTIONS = TRIGONOMETRIC | {"log", "ln", "exp", "lfloor", "rfloor", "lceil", "rceil"}
COMMANDS = FUNCTIONS | GREEK | {"pi", "frac", "sqrt", "binom", "cdot", "times", "div"}
ACCENTS = frozenset(["bar", "hat", "vec", "tilde", "dot", "ddot"])
SHIFTED_FACTORIAL = re.compile(r"\((?=[^()]*[A-Za-z])(?:[A-Za-z0-9 +-](?!\d\d))*\) ?!(?! ?!)")  # (n+1)!, (2n-k)!


def check_for_worker(text: str) -> None:
    """Refuse what must not reach the computer algebra system: unknown commands, towers, huge factorials, other text.

    Raises:
        Unreadable: the text is one of these.
    """
    if not re.fullmatch(r"[A-Za-z0-9+\-*/^_()\[\]{}|!.\\ ]*", text):
        raise Unreadable("a character that no formula has")
    for command in COMMAND.finditer(text):
        if command[1] not in COMMANDS:
            raise Unreadable(rf"\{command[1]} is not part of the language of answers")
    if re.search(r"\\(?![A-Za-z])|!\s*[!^]|[)}]\s*!|[0-9]{4,}\s*!", SHIFTED_FACTORIAL.sub(";", text)):
        raise Unreadable("a factorial too large to compute")
    if re.search(r"\^\s*(?:[({]\s*)*-?\s*[0-9]{4,}|\\binom\s*\{\s*[0-9]{5,}|\\binom\s*\{[^{}]*[{^]", text):
        raise Unreadable("a power or binomial coefficient too large to compute")
    if re.search(r"\^\s*[({]?\s*[0-9]*\s*\^|\^\s*[({][^{}()]*\^\s*[({][^{}()]*\^", text):
        raise Unreadable("a tower of powers")
    if re.search(r"[0-9]\s+[0-9]|[A-Za-z)}]\s*[0-9]", re.sub(r"\\[A-Za-z]+|\}\s*\{|_\s*\{?[0-9]+\}?", ";", text)):
        raise Unreadable("numbers side by side")
