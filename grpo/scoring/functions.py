"""Where the reward functions of a recipe are, and the few that have workers of their own.

No other module of the trainer imports a reward; ``process.py`` and ``worker.py`` import ``rewards.processes``.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from grpo import user_code
from grpo.config import ENVIRONMENT, RewardConfig, ScoringConfig
from grpo.errors import UserError
from grpo.scoring.call import FunctionSpec
from grpo.types import REWARD_KEYWORDS
from rewards import REWARDS
from rewards.secrets import secrets_of

log = logging.getLogger(__name__)


def locate(rewards: Sequence[RewardConfig], scoring: ScoringConfig) -> list[FunctionSpec]:
    specs: list[FunctionSpec] = []
    for index, reward in enumerate(rewards):
        where = reward.where(index)
        taken = sorted(REWARD_KEYWORDS & reward.args.keys())
        if taken:
            raise UserError(f"{where}: args.{taken[0]} is a name the trainer passes itself")
        place = _builtin(reward.name, where) if reward.name else _user_function(str(reward.path), where)
        key, number = place["key"], 2
        while any(spec.key == place["key"] for spec in specs):
            place["key"], number = f"{key}#{number}", number + 1
        specs.append(FunctionSpec(**place, args=reward.args, timeout=reward.timeout or scoring.timeout, where=where))
    return specs


def _builtin(name: str, where: str) -> dict[str, Any]:
    if name == ENVIRONMENT:
        return {"key": name, "source": "what the environment paid", "module": "", "attribute": "", "builtin": True}
    if name not in REWARDS:
        raise UserError(
            f"{where}: no built-in reward {name!r} (there are: {', '.join((*REWARDS, ENVIRONMENT))}); "
            "a function of your own is `path: file.py:fn`"
        )
    attribute = f"{name}_reward"
    source = f"rewards.{name}.{attribute}"
    return {"key": name, "source": source, "module": f"rewards.{name}", "attribute": attribute, "builtin": True}


def _user_function(path: str, where: str) -> dict[str, Any]:
    module, attribute = user_code.split_place(path, f"{where}.path")
    file = user_code.file_of(module, f"{where}.path")
    return {"key": attribute, "source": path, "module": str(file or module), "attribute": attribute}


def start_own_workers(specs: Sequence[FunctionSpec], workers: int) -> dict[int, ModuleType]:
    """Start the workers of built-in rewards that bring their own; their modules, by the index of the function.

    Such a module has ``start(workers, …)`` and ``stop()``; its reward is called in the trainer, never inside a scoring
    worker: a pool in a pool would be killed for the slowness of the inner one.

    Raises:
        UserError: they cannot be started; the message says what would help.
    """
    modules: dict[int, ModuleType] = {}
    for index, spec in enumerate(specs):
        module = import_module(spec.module) if spec.builtin and not spec.is_paid else None
        if module is not None and hasattr(module, "start"):
            accepted = inspect.signature(module.start).parameters
            try:
                module.start(workers, **{key: value for key, value in spec.args.items() if key in accepted})
            except RuntimeError as why:
                for started in modules.values():
                    started.stop()
                raise UserError(f"{spec.where} ({spec.source}): {why}") from None
            modules[index] = module
    return modules


def judged_by(name: str) -> str:
    """What a built-in reward judges, as its module says: ``answer``, ``form`` or ``shaping``; ``environment`` for what
    one pays. Empty for no reward."""
    if name == ENVIRONMENT:
        return ENVIRONMENT
    return "" if name not in REWARDS else str(getattr(import_module(f"rewards.{name}"), "JUDGES", "answer"))


Vote = Callable[[Sequence[str], Sequence[str], Sequence[str]], list[int | None]]
"""From completions, prefills and statuses to a number for each: equal for equal answers, None where there is none."""


def voter(reward: RewardConfig) -> Vote | None:
    """What tells which completions give the same answer, for a majority vote: ``votes`` of a built-in reward's module.
    None for a reward that can't tell. It gets those of the reward's ``args`` that it takes."""
    vote = getattr(import_module(f"rewards.{reward.name}"), "votes", None) if reward.name in REWARDS else None
    if vote is None:
        return None
    accepted = inspect.signature(vote).parameters
    return partial(vote, **{key: value for key, value in reward.args.items() if key in accepted})


def needs_ids(spec: FunctionSpec) -> bool:
    """Whether a built-in reward cannot do without the tokens of completions."""
    asked = inspect.signature(getattr(import_module(spec.module), spec.attribute)).parameters.get("completion_ids")
    return asked is not None and asked.default is asked.empty


def tell_left_out(rewards: Sequence[RewardConfig], keep: Sequence[str]) -> None:
    """Say which variables of the environment the user's functions do not get."""
    left_out = sorted(secrets_of(os.environ).keys() - set(keep))
    if left_out and any(reward.path for reward in rewards):
        log.info(
            "reward functions do not get %s, which may be secret; scoring.environment lets one through",
            ", ".join(left_out),
        )


def row_checks(rewards: Sequence[RewardConfig]) -> list[tuple[RewardConfig, Callable[[dict[str, Any]], str | None]]]:
    """What built-in rewards can say of a row before anything is sampled: the reward, and the function to ask.

    ``check_row(columns, …)`` of a reward's module gives the reason why no completion could be right, None where one
    could. It gets those of the reward's ``args`` that it takes.
    """
    checks: list[tuple[RewardConfig, Callable[[dict[str, Any]], str | None]]] = []
    for index, reward in enumerate(rewards):
        if not reward.name or reward.name == ENVIRONMENT or reward in rewards[:index]:
            continue
        if check := getattr(import_module(f"rewards.{reward.name}"), "check_row", None):
            accepted = inspect.signature(check).parameters
            checks.append((reward, partial(check, **{k: v for k, v in reward.args.items() if k in accepted})))
    return checks
