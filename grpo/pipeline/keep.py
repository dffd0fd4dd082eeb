"""Which of a prompt's sampled completions are kept as rows to imitate: rules in the order given, each on what is left.

    correct             the recipe's judging reward pays 1
    well_formed         its form is right: the recipe's reward of the form pays 1, or the built-in ``format`` does
    language[=CODE]     at least 95% of its words are in the language (``en``); a text without words passes
    not_repetitive[=N]  at most 10% of its N-grams (20) of tokens have occurred before in it
    pass_rate=LOW..HIGH the share of the prompt's completions that are correct is within these bounds
    NAME>=X             the reward of this name in the recipe pays at least X
    distinct[=expressions]  of completions with the same path the shortest: the same thinking but for case, spaces and
                        punctuation; or with ``expressions`` the same sequence of arithmetic expressions in it
    shortest=K          the K shortest in tokens

The first seven judge a completion by itself, the last two choose among a prompt's completions. R1's own sampling kept
what is correct, readable and in one language (arXiv:2501.12948, section 2.3.3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpo.config import Recipe, RewardConfig
from grpo.errors import UserError
from grpo.scoring.grade import Graded

LANGUAGE_SHARE = 0.95
REPEATED_SHARE = 0.1
NGRAM = 20
SIGNS = "-+*/\u00d7\u00f7^"
PART = re.compile(rf"[{SIGNS}()]")

Row = Mapping[str, Any]  # a group as ``sampled.sample_row`` makes it
Choose = Callable[[Row, Sequence[int], "Measures"], list[int]]
Measures = Mapping[str, Sequence[bool]]  # of a group, by a rule's text: whether a completion passes its measure


@dataclass(frozen=True)
class Measure:
    """A built-in reward that a rule asks beside those of the recipe."""

    reward: RewardConfig
    passes: Callable[[Graded], bool]


@dataclass(frozen=True)
class Rule:
    """``choose`` returns which of the completions that are left (their places in the group) stay. ``compares``: it
    looks at several of them."""

    text: str
    choose: Choose
    measure: Measure | None = None
    compares: bool = False


def parse_rules(given: Iterable[str], recipe: Recipe) -> list[Rule]:
    """The rules of ``--keep``. Raises UserError with all that are wrong."""
    rules, problems = [], []
    for text in (rule.strip() for rule in given):
        try:
            rules.append(_parse(text, recipe))
        except ValueError as error:
            problems.append(f"--keep {text}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    if not rules:
        raise UserError("--keep: name at least one rule, such as correct,distinct,shortest=2")
    return rules


def apply(rules: Sequence[Rule], row: Row, left: Sequence[int], measures: Measures) -> list[list[int]]:
    """The places that are left after each rule."""
    after, now = [], list(left)
    for rule in rules:
        now = rule.choose(row, now, measures)
        after.append(now)
    return after


# --- the rules -------------------------------------------------------------------------------------------------------


def _parse(text: str, recipe: Recipe) -> Rule:
    if ">=" in text:
        name, _, least = (part.strip() for part in text.partition(">="))
        if name not in recipe.reward_names():
            raise ValueError(f"the recipe has no reward {name!r} (there are {', '.join(recipe.reward_names())})")
        return Rule(text, partial(_pays, name, _number(least)))
    name, _, value = (part.strip() for part in text.partition("="))
    if name not in RULES:
        raise ValueError(f"no such rule; there are {', '.join(RULES)} and REWARD>=NUMBER")
    return RULES[name](text, value, recipe)


def _correct(text: str, value: str, recipe: Recipe) -> Rule:
    _no_value(value)
    return Rule(text, lambda row, left, measures: _pays(judge_of(recipe, row), 1.0, row, left, measures))


def _well_formed(text: str, value: str, recipe: Recipe) -> Rule:
    _no_value(value)
    labels = [source.label for source in recipe.data.sources()]
    for name, reward in zip(recipe.reward_names(), recipe.functions(), strict=True):
        if reward.name == "format" and all(map(reward.scores, labels)):
            return Rule(text, partial(_pays, name, 1.0))
    return _measured(text, RewardConfig(name="format"), lambda form: form.verdict == "correct")


def _language(text: str, value: str, recipe: Recipe) -> Rule:
    reward = RewardConfig(name="language", args={"language": value or "en"})
    return _measured(text, reward, _in_the_language)


def _not_repetitive(text: str, value: str, recipe: Recipe) -> Rule:
    size = _whole(value, "N-grams of how many tokens") if value else NGRAM
    reward = RewardConfig(name="repetition", args={"ngram_size": size})
    return _measured(text, reward, _few_repeated)


def _pass_rate(text: str, value: str, recipe: Recipe) -> Rule:
    low, high = window(value)
    return Rule(text, partial(_within, recipe, low, high))


def _distinct(text: str, value: str, recipe: Recipe) -> Rule:
    if value not in ("", "expressions"):
        raise ValueError("write distinct, or distinct=expressions")
    return Rule(text, partial(_one_a_path, expressions if value else thinking), compares=True)


def _shortest(text: str, value: str, recipe: Recipe) -> Rule:
    return Rule(text, partial(_k_shortest, _whole(value, "how many a prompt")), compares=True)


RULES: dict[str, Callable[[str, str, Recipe], Rule]] = {
    "correct": _correct,
    "well_formed": _well_formed,
    "language": _language,
    "not_repetitive": _not_repetitive,
    "pass_rate": _pass_rate,
    "distinct": _distinct,
    "shortest": _shortest,
}


def _measured(text: str, reward: RewardConfig, passes: Callable[[Graded], bool]) -> Rule:
    return Rule(text, lambda row, left, measures: [g for g in left if measures[text][g]], Measure(reward, passes))


def _in_the_language(share: Graded) -> bool:
    return share.verdict == "no_answer" or (share.reward is not None and share.reward >= LANGUAGE_SHARE)


def _few_repeated(penalty: Graded) -> bool:
    return penalty.reward is not None and -penalty.reward <= REPEATED_SHARE


def _pays(name: str, least: float, row: Row, left: Sequence[int], measures: Measures) -> list[int]:
    def paid(g: int) -> float:
        value = row["completions"][g]["rewards"].get(name)
        return float("-inf") if value is None else value

    return [g for g in left if paid(g) >= least]


def pass_rate(row: Row, name: str) -> float | None:
    """The share of a prompt's scored completions that reward ``name`` pays 1; None where none was scored."""
    values = [completion["rewards"].get(name) for completion in row["completions"]]
    scored = [value for value in values if value is not None]
    return sum(value >= 1 for value in scored) / len(scored) if scored else None


def judge_of(recipe: Recipe, row: Row) -> str:
    """The reward whose 1 means that a completion of this group is right."""
    return recipe.judged_by(row.get("source", ""))


def _within(recipe: Recipe, low: float, high: float, row: Row, left: Sequence[int], measures: Measures) -> list[int]:
    rate = pass_rate(row, judge_of(recipe, row))
    return list(left) if rate is not None and low <= rate <= high else []


def _by_length(row: Row, left: Sequence[int]) -> list[int]:
    return sorted(left, key=lambda g: (len(row["completions"][g]["token_ids"]), g))


def _k_shortest(k: int, row: Row, left: Sequence[int], measures: Measures) -> list[int]:
    return sorted(_by_length(row, left)[:k])


def _one_a_path(path: Callable[[str], tuple[str, ...]], row: Row, left: Sequence[int], measures: Measures) -> list[int]:
    shortest: dict[tuple[str, ...], int] = {}
    for g in _by_length(row, left):
        shortest.setdefault(path(row["prefill"] + row["completions"][g]["text"]), g)
    return sorted(shortest.values())


# --- paths to an answer ----------------------------------------------------------------------------------------------


def thinking(text: str) -> tuple[str, ...]:
    """The words and signs of arithmetic in the thinking, in lower case. The thinking ends at ``</think>``, or where the
    answer begins, or with the text."""
    return tuple(re.findall(rf"\w+|[{SIGNS}<>=]", _before_answer(text).casefold()))


def expressions(text: str) -> tuple[str, ...]:
    """The arithmetic expressions in the thinking, in order, without spaces: ``("6+3", "9*2")``. Without any, its words.

    An expression is a run of numbers, operators and parentheses with an operator between two numbers.
    """
    found: list[list[str]] = []
    run: list[str] = []
    for piece in [*re.findall(r"\d+(?:\.\d+)?|\S", _before_answer(text)), "."]:
        number = piece[0].isdecimal()
        if not (number or PART.match(piece)) or (
            number and run and run[-1][0].isdecimal()
        ):  # `4 5 + 6`: another begins
            found.append(run)
            run = []
        if number or PART.match(piece):
            run.append(piece)
    whole = [run for run in found if sum(piece[0].isdecimal() for piece in run) > 1]
    return tuple("".join(run) for run in whole) or thinking(text)


def _before_answer(text: str) -> str:
    for end in ("</think>", "<answer>"):
        if end in text:
            return text[: text.index(end)].replace("<think>", " ")
    return text


# --- numbers ---------------------------------------------------------------------------------------------------------


def window(text: str) -> tuple[float, float]:
    """Bounds written as ``0.1..0.9``. Raises ValueError."""
    low, dots, high = text.partition("..")
    if not dots:
        raise ValueError("write LOW..HIGH, such as 0.1..0.9")
    bounds = _number(low), _number(high)
    if not 0 <= bounds[0] <= bounds[1] <= 1:
        raise ValueError(f"{text} is no window within 0..1")
    return bounds


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None


def _whole(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError(f"needs a number above 0 ({what}), got {text!r}")
    return int(text)


def _no_value(value: str) -> None:
    if value:
        raise ValueError("takes no value")
