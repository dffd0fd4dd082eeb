"""What the tests of scoring share: groups of given texts, scorers with short timeouts, and looking at processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.config import RewardConfig, ScoringConfig
from grpo.scoring.call import FunctionSpec
from grpo.scoring.functions import locate
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt, Status

MISBEHAVING = Path(__file__).with_name("misbehaving.py")
SHORT = 0.3  # seconds; for calls that hang


def misbehaving(function: str, **config: Any) -> RewardConfig:
    return RewardConfig(path=f"{MISBEHAVING}:{function}", **config)


def spec_of(function: str, file: Path = MISBEHAVING) -> FunctionSpec:
    """Where a function is, as the scorer hands it to its workers."""
    (spec,) = locate([RewardConfig(path=f"{file}:{function}")], ScoringConfig())
    return spec


def group(*texts: str, prompt: Any = "p", id: int = 0, columns: Any = None, prefill: str = "") -> Group:
    completions = [Completion([len(text)], [0.0], Status.STOP, text, []) for text in texts]
    return Group(Prompt(id, prompt, str(prompt), [1], prefill, columns or {}), completions)


def scorer(
    *rewards: RewardConfig, workers: int = 1, timeout: float = 20.0, max_failure_rate: float = 1.0, **kwargs: Any
) -> Scorer:
    scoring = ScoringConfig(workers=workers, timeout=timeout, memory_limit_gb=0.5, max_failure_rate=max_failure_rate)
    return Scorer(list(rewards), scoring, **kwargs)


def alive(pid: int) -> bool:
    """Running, and not a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
