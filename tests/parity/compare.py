"""Ours beside TRL's, or beside the plain loops where TRL has no such loss: one line a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.parity.cases import Case, Problem
from tests.parity.ours import gradient_of, our_loss, posed
from tests.parity.reference import reference_gradient, reference_selection

TOLERANCE = 1e-5
SEEDS = (0, 1, 2, 3)
MICRO_BATCHES = 3
Gradient = tuple[torch.Tensor, float]


@dataclass(frozen=True)
class Line:
    """The largest over seeds. ``gradient`` and ``split`` are |g - g'| / |g'|, as one micro-batch and in several."""

    name: str
    beside: str
    loss: float
    gradient: float
    split: float
    remark: str = ""

    @property
    def passes(self) -> bool:
        return not self.remark and max(self.loss, self.gradient, self.split) < TOLERANCE


def of_reference(problem: Problem) -> Gradient:
    gradient, loss = reference_gradient(problem)
    return torch.tensor(gradient, dtype=torch.float64), loss


def beside_reference(case: Case) -> Line:
    """With the selection of tokens, where the case has one of its own, held to its definition."""
    line = _compared(case, "plain loops", of_reference)
    return Line(line.name, line.beside, line.loss, line.gradient, line.split, _wrong_selection(case))


def beside_trl(case: Case) -> Line:
    from tests.parity.trl_side import trl_loss

    return _compared(case, "TRL", lambda problem: gradient_of(trl_loss, problem))


def _compared(case: Case, beside: str, theirs: Callable[[Problem], Gradient]) -> Line:
    worst = [0.0, 0.0, 0.0]
    for seed in SEEDS:
        whole = posed(case, seed)
        parts = whole.in_micro_batches(MICRO_BATCHES)
        expected = theirs(whole)
        ours, ours_in_parts = gradient_of(our_loss, whole), gradient_of(our_loss, parts)
        expected_in_parts = theirs(parts) if case.splits else expected
        found = [
            abs(ours[1] - expected[1]) / abs(expected[1]),
            distance(ours[0], expected[0]),
            distance(ours_in_parts[0], expected_in_parts[0]),
        ]
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
    return Line(case.name, beside, *worst)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative."""
    return float((ours - theirs).norm() / theirs.norm())


def _wrong_selection(case: Case) -> str:
    if case.options.get("loss_type") not in ("clip_cov", "kl_cov"):
        return ""
    for seed in SEEDS:
        problem = posed(case, seed)
        assert problem.kept_BT is not None
        selected = {(int(b), int(t)) for b, t in (problem.kept_BT == 0).nonzero()}
        allowed = reference_selection(problem)
        wanted = max(int(0.1 * int(problem.x["mask_BT"].sum())), 1)
        if not selected <= allowed or len(selected) != min(wanted, len(allowed)):
            return f"seed {seed}: selects {sorted(selected)}, of {sorted(allowed)}"
    return ""


def adaptive_entropy() -> Line:
    """Five updates under changing entropy: coefficient, loss and gradient of each."""
    from grpo.losses import EntropyControl, next_entropy_control
    from tests.parity.trl_side import stand_in, trl_loss

    numbers = {"entropy_coef": 0.02, "entropy_target": 0.5, "entropy_coef_delta": 0.005, "entropy_coef_max": 0.03}
    trainer = stand_in(numbers | {"use_adaptive_entropy": True, "loss_type": "dapo"})
    control, worst, applied = EntropyControl(0.02), [0.0, 0.0], []
    for seed, scale in enumerate((1.5, 0.5, 0.3, 0.4, 1.2)):
        problem = posed(Case("", {"loss_type": "dapo"}, {}), seed)
        problem.x["entropies_BT"] *= scale
        applied.append(control.applied(0.5))
        case = Case("", {"loss_type": "dapo"}, {}, entropy_coef=applied[-1])
        ours = gradient_of(our_loss, Problem(case, problem.x))
        theirs = gradient_of(lambda *given: trl_loss(*given, trainer=trainer), problem)
        mask_BT = problem.x["mask_BT"]
        entropy = float((problem.x["entropies_BT"] * mask_BT).sum() / mask_BT.sum())
        control = next_entropy_control(control, entropy, target=0.5, delta=0.005, low=0.0, high=0.03)
        found = abs(ours[1] - theirs[1]) / abs(theirs[1]), distance(ours[0], theirs[0])
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
        worst[0] = max(worst[0], abs(control.coef - trainer.entropy_coef))
    remark = "" if len(set(applied)) > 2 else f"the coefficient hardly moved: {applied}"
    return Line("dapo, use_adaptive_entropy", "TRL", worst[0], worst[1], worst[1], remark)
