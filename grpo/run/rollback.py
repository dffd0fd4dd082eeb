"""Back to the best model, where a rule of health asks for it (``health.RULE: rollback``).

After each evaluation that is the best so far, a run that may roll back keeps its whole state in checkpoints/best/. The
weights in best/ would not do: they are in the compute type, with adapters merged.

What belongs to the policy goes back: weights, the optimizer's moments, a moving reference, the adaptive entropy bonus,
and what steps have learned about prompts. The moments go with the weights, because they are averages over the steps
that failed: the first would push on in that direction, and the second, blown up, would hold later steps back. At the
start there are none, and they begin anew. What counts goes on: steps, tokens, seconds, prompts drawn. So the steps that
follow draw other prompts and other tokens, at the learning rates of their own numbers, and a resumed run repeats it all
to the bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from grpo.config import Recipe
from grpo.health.best import Best
from grpo.model.policy import Policy
from grpo.run.manifest import DamagedCheckpoint, UnreadableCheckpoint, verify
from grpo.run.state import BEST, Progress, load_state

KEPT = 2  # states: a run that is resumed from before the newest may still need the one before it


def states_of_best(folder: Path) -> Path:
    """Where a run's folder has the states of its best models, as checkpoints."""
    return folder / "checkpoints" / BEST


def state_of_best(folder: Path, best: Best) -> Path:
    return states_of_best(folder) / f"step_{best.step:06d}"


def why_not(folder: Path, best: Best, most: int) -> str | None:
    """Why the run can't go back to its best model, if so. Reads all of its state."""
    if best.rollbacks >= most:
        return f"it has gone back to its best model {best.rollbacks} times already (health.max_rollbacks)"
    if best.value is None:
        return "there is no evaluation yet, and so no best model to go back to"
    try:
        verify(state_of_best(folder, best))
    except (DamagedCheckpoint, UnreadableCheckpoint) as error:
        return (
            f"the state of its best model can't be used ({state_of_best(folder, best)}: {error}); it is kept from the "
            "next better evaluation on, where a rule's action is rollback"
        )
    return None


def go_back(path: Path, recipe: Recipe, policy: Policy, now: Progress) -> Progress:
    """Load the state of the best model, which was verified, and return how far the run then is. Called by all."""
    best = Progress(**load_state(path, recipe, policy).states["progress"])
    return replace(
        now,
        entropy_control=best.entropy_control,
        pass_rates=best.pass_rates,
        replay=best.replay,
        rollout_ahead=None,
    )
