"""``grpo audit`` for environments: who does the task must be paid, who does not try must not, and nothing may leak.

An environment is played in its processes, as in a run, without a model. What idle, babbling and looping play is paid is
compared with what the script is paid, over all rows: a lucky guess now and then is no finding. An answer leaks where
what the environment says to those who do not try holds the row's own answer more often than another row's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from grpo import user_code
from grpo.audit.plays import CHEATS, KNOWING, Played, Turn, cheats, played
from grpo.config import ENVIRONMENT, Recipe
from grpo.environments.find import spec_of
from grpo.environments.worlds import Worlds
from grpo.errors import UserError

ANSWERS = ("answer", "solution", "completion", "target", "label", "secret", "gold", "word")
"""Columns that hold what the model is to find out."""
SHARE = 0.25  # of what the script is paid, on average, that a cheat must stay below
LEAKS = 0.3  # by which rows whose own answer is seen are more than those in which another's is
ROWS = 40
FRAME = re.compile(r'File "([^"]+)", line (\d+)')
Row = tuple[str, dict[str, Any]]  # its place, and its columns


def audit_environment(recipe: Recipe, rows: Sequence[Row], tell: Callable[[str], Any]) -> list[str]:
    """Play the recipe's environment on up to ``ROWS`` rows; returns a line for each finding, and ``tell`` gets the
    report.

    Raises:
        UserError: the environment cannot be had, or its script returns no turns.
    """
    config = recipe.environment
    assert config is not None
    chosen = [rows[i * len(rows) // ROWS] for i in range(ROWS)] if len(rows) > ROWS else list(rows)
    script = _script(config.name, config.path)
    results: dict[str, list[Played]] = {name: [] for name in (KNOWING, *CHEATS)}
    limits = {"timeout": config.timeout, "memory_gb": config.memory_limit_gb}
    with Worlds(spec_of(config), **limits, keep=recipe.scoring.environment) as worlds:
        for number, (place, row) in enumerate(chosen):
            plays: dict[str, Sequence[Turn]] = dict(cheats(worlds.about, number, config.max_turns))
            if script is not None:
                plays[KNOWING] = _turns(script, row, place, worlds.about.game)
            for name, turns in plays.items():
                results[name].append(played(worlds, row, turns[: config.max_turns], seed=number))
    where = f"environment {config.name or config.path or ', '.join(config.tools)}"
    return _report(where, recipe, chosen, results, has_script=script is not None, tell=tell)


def _script(name: str | None, path: str | None) -> Callable[[dict[str, Any]], Any] | None:
    """The function ``play`` beside the environment's class, if there is one."""
    if name is not None:
        return getattr(import_module(f"grpo.environments.{name}"), "play", None)
    if path is None:
        return None
    module = user_code.load_module(user_code.split_place(path, "environment.path")[0], "environment.path")
    return getattr(module, "play", None)


def _turns(script: Callable[[dict[str, Any]], Any], row: dict[str, Any], place: str, game: bool) -> list[Turn]:
    try:
        turns = list(script(row))
    except Exception as why:  # the user's code
        raise UserError(f"environment: play(row) failed on {place}: {user_code.stopped_at(why)}") from None
    fits = all(isinstance(turn, str) if game else _is_call(turn) for turn in turns)
    if not fits:
        wanted = "texts" if game else 'calls, {"name": ..., "arguments": {...}}'
        raise UserError(f"environment: play(row) returned {user_code.brief(turns)} for {place}; expected {wanted}")
    return turns


def _is_call(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("name"), str) and isinstance(turn.get("arguments"), dict)


def _report(
    where: str,
    recipe: Recipe,
    rows: list[Row],
    results: dict[str, list[Played]],
    *,
    has_script: bool,
    tell: Callable[[str], Any],
) -> list[str]:
    findings: list[str] = []
    lines = [f"{where}  (played on {len(rows)} rows)"]
    if not has_script:
        lines.append("  the script     there is none: a function play(row) beside an environment's class returns the")
        lines.append("                 turns of one who does the task (docs/environments.md)")
    means = {name: _mean(episodes) for name, episodes in results.items()}
    for name, episodes in results.items():
        if episodes:
            lines.append(f"  {name:<14} {_told(episodes)}")
            findings += _failures(name, episodes)
    findings += _errors_of_script(results[KNOWING]) + _no_pay(results, recipe)
    findings += _of_pay(rows, results, means)
    leaking = _leak(rows, results)
    lines.append(f"  leaks          {leaking or 'what it says to those who do not try holds no answer of the row'}")
    findings += [leaking] if leaking else []
    tell("\n".join(lines))
    return [f"{where}: {finding}" for finding in findings]


def _mean(episodes: list[Played]) -> float | None:
    paid = [episode.paid for episode in episodes if episode.paid is not None]
    return sum(paid) / len(paid) if paid else None


def _told(episodes: list[Played]) -> str:
    paid = [episode.paid for episode in episodes if episode.paid is not None]
    failed = Counter(episode.failure for episode in episodes if episode.failure)
    told = "is paid nothing"
    if paid:
        told = f"is paid {min(paid):g} to {max(paid):g}, {sum(paid) / len(paid):.3g} on average"
    return told + "".join(f"; fails in {number} rows ({cause})" for cause, number in failed.items())


def _failures(name: str, episodes: list[Played]) -> list[str]:
    failed = [episode for episode in episodes if episode.failure]
    if not failed:
        return []
    message = failed[0].message.strip()
    said, places = message.splitlines()[-1:] or [""], FRAME.findall(message)
    where = f" ({places[-1][0]}:{places[-1][1]})" if places else ""
    return [
        f"{name} fails in {len(failed)} of {len(episodes)} rows, first by {failed[0].failure}: {said[0][:200]}{where}"
    ]


def _errors_of_script(episodes: list[Played]) -> list[str]:
    """One who does the task makes calls that can be answered."""
    wrong = [episode.errors[0] for episode in episodes if episode.errors]
    return (
        [f"calls of the script raise in {len(wrong)} of {len(episodes)} rows, first {wrong[0][:200]}"] if wrong else []
    )


def _no_pay(results: dict[str, list[Played]], recipe: Recipe) -> list[str]:
    """The environment's own reward is asked for, and it pays nothing, not even 0."""
    own = any(reward.name == ENVIRONMENT for reward in recipe.functions())
    played = [episode for episodes in results.values() for episode in episodes if not episode.failure]
    if not own or not played or any(episode.paid is not None for episode in played):
        return []
    return [
        "it pays nothing, not even 0, in any row: does get_reward return a number? A game without get_reward pays by "
        "step, which then returns (observation, reward, done)"
    ]


def _of_pay(rows: list[Row], results: dict[str, list[Played]], means: dict[str, float | None]) -> list[str]:
    knowing, findings = means[KNOWING], []
    unpaid = [
        place
        for (place, _), episode in zip(rows, results[KNOWING], strict=False)
        if episode.paid is not None and episode.paid <= 0
    ]
    if unpaid:
        findings.append(f"the script is paid nothing in {len(unpaid)} of {len(rows)} rows, first {unpaid[0]}")
    for name in CHEATS:
        mean = means[name]
        if mean is None or mean <= 0:
            continue
        if knowing is not None and mean >= SHARE * knowing:
            findings.append(f"{name} is paid {mean:.3g} on average, and the script {knowing:.3g}")
        elif knowing is None and mean >= SHARE:
            findings.append(f"{name} is paid {mean:.3g} on average")
    return findings


def _leak(rows: list[Row], results: dict[str, list[Played]]) -> str:
    """Where the row's own answer is seen, and another row's is not; empty where nothing leaks."""
    for name in CHEATS:
        seen = ["\n".join(episode.observed) for episode in results[name]]
        for column in ANSWERS:
            answers = [str(row.get(column)) if row.get(column) not in (None, "") else None for _, row in rows]
            others = answers[1:] + answers[:1]
            known = [i for i, answer in enumerate(answers) if answer is not None and answer != others[i]]
            own = [i for i in known if _holds(seen[i], answers[i])]
            foreign = [i for i in known if _holds(seen[i], others[i])]
            if len(known) >= 2 and len(own) - len(foreign) > LEAKS * len(known):
                return (
                    f"what it says to {name} holds the row's own {column} in {len(own)} of {len(known)} rows "
                    f"(first {rows[own[0]][0]}), another row's in {len(foreign)}"
                )
    return ""


def _holds(text: str, answer: str | None) -> bool:
    """Whether a text holds an answer, not as a part of a longer word or number."""
    return bool(answer) and re.search(rf"(?<!\w){re.escape(str(answer))}(?!\w)", text) is not None
