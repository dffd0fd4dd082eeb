"""The cases that are compared, and the random tensors that they are compared on: ragged, off-policy, with groups whose
advantage is zero, and rubbish under the mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

LENGTHS = [9, 1, 2, 6, 5, 7]
B, T, MAX_LENGTH = len(LENGTHS), max(LENGTHS), 12
WINDOW = {"clip_min": 0.6, "clip_max": 1.7}


@dataclass(frozen=True)
class Case:
    """``options`` go to ``policy_loss``; ``mode`` weighs by the sampler; a selection keeps ``top_entropy`` of the
    tokens or is the loss type's; ``trl`` are the settings of TRL's trainer that mean the same, None without any."""

    name: str
    options: dict[str, Any]
    trl: dict[str, Any] | None = None
    mode: str | None = None
    top_entropy: float = 1.0
    entropy_coef: float = 0.0
    splits: bool = True  # TRL's own result in several micro-batches is meant to be the same
    on_policy: bool = False


def _case(name: str, *, trl: dict[str, Any] | None = None, own: dict[str, Any] | None = None, **same: Any) -> Case:
    """``same`` are options that both have; ``trl`` and ``own`` those of one side; ``trl=None`` with no counterpart."""
    of_case = {
        key: same.pop(key) for key in ("mode", "top_entropy", "entropy_coef", "splits", "on_policy") if key in same
    }
    return Case(name, same | (own or {}), None if trl is None else same | trl, **of_case)


def cases() -> list[Case]:
    in_trl: dict[str, Any] = {}
    sequence = {"importance_sampling_level": "sequence"}
    made = [_case(name, trl=in_trl, loss_type=name) for name in ("grpo", "dr_grpo", "dapo", "bnpo", "sapo")]
    made += [
        _case("cispo", trl=in_trl, loss_type="cispo", epsilon_high=1.3),
        _case("vespo", trl=in_trl, loss_type="vespo"),
        _case("luspo", trl=sequence, loss_type="luspo"),
        _case("gspo", trl={"loss_type": "grpo"} | sequence, own={"loss_type": "gspo"}),
        _case("rloo", trl={"trainer": "rloo"}, own={"loss_type": "rloo"}, splits=False),
        _case("reinforce", loss_type="reinforce"),
        _case("reinforce_pp", loss_type="reinforce_pp"),
        _case("clip_cov", loss_type="clip_cov", clip_cov_ratio=0.1, clip_cov_lb=0.05, clip_cov_ub=5.0),
        _case("kl_cov", loss_type="kl_cov", kl_cov_ratio=0.1, ppo_kl_coef=0.7),
        _case("dapo, on-policy", trl=in_trl, loss_type="dapo", on_policy=True),
        _case("dapo, epsilon_high", trl=in_trl, loss_type="dapo", epsilon_high=0.28),
        _case("dapo, delta (dual clip)", trl=in_trl, loss_type="dapo", delta=1.25),
        _case("dapo, level sequence", trl=in_trl, loss_type="dapo", **sequence),
        _case("gspo, level sequence_token", loss_type="gspo", importance_sampling_level="sequence_token"),
        _case(
            "dapo, top_entropy_quantile",
            trl={"top_entropy_quantile": 0.3},
            loss_type="dapo",
            top_entropy=0.3,
            splits=False,
        ),
        _case("grpo, entropy_coef", trl=in_trl, loss_type="grpo", entropy_coef=0.05, splits=False),
        _case(
            "dapo, both of these",
            trl={"top_entropy_quantile": 0.3},
            loss_type="dapo",
            top_entropy=0.3,
            entropy_coef=0.05,
            splits=False,
        ),
        _case("dapo, off_policy_mask_threshold", trl=in_trl, loss_type="dapo", off_policy_mask_threshold=0.05),
    ]
    for loss_type in ("grpo", "dr_grpo", "dapo", "bnpo", "sapo", "cispo", "vespo"):
        high = {"epsilon_high": 1.3} if loss_type == "cispo" else {}
        made.append(_case(f"{loss_type}, KL k3", trl=in_trl, loss_type=loss_type, beta=0.3, **high))
    made += [
        _case("dapo, KL k3, bias-corrected", trl=in_trl, loss_type="dapo", beta=0.3, use_bias_correction_kl=True),
        _case(
            "gspo, KL k3, bias-corrected",
            trl={"loss_type": "grpo"} | sequence,
            own={"loss_type": "gspo"},
            beta=0.3,
            use_bias_correction_kl=True,
        ),
    ]
    for estimator in ("k1", "k2"):
        for correct in (False, True):
            name = f"dapo, KL {estimator}" + (", bias-corrected" if correct else "")
            made.append(_case(name, loss_type="dapo", beta=0.3, kl_estimator=estimator, use_bias_correction_kl=correct))
    modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    made += [_case(f"dapo, {mode}", trl=in_trl, loss_type="dapo", mode=mode, beta=0.1) for mode in modes]
    made += [_case(f"vespo, {mode}", trl=in_trl, loss_type="vespo", mode=mode) for mode in modes]
    return made


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """float64. Every sequence has a token; two of a group have advantage zero."""
    g = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(B, T, generator=g, dtype=torch.float64)

    old_BT = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    return {
        "logps_BT": old_BT + noise(0.4),
        "old_logps_BT": old_BT,
        "ref_logps_BT": old_BT + noise(0.3),
        "sampler_logps_BT": old_BT + noise(0.5),
        "entropies_BT": torch.rand(B, T, generator=g, dtype=torch.float64),
        "advantages_B": torch.tensor([1.5, -0.7, 0.0, 0.0, -2.0, 0.8], dtype=torch.float64),
        "mask_BT": torch.tensor([[float(t < n) for t in range(T)] for n in LENGTHS], dtype=torch.float64),
    }


@dataclass
class Problem:
    """A case on tensors: what both sides are given besides."""

    case: Case
    x: dict[str, torch.Tensor]
    weights: torch.Tensor | None = None  # (B,T) or (B,1)
    kept_BT: torch.Tensor | None = None
    rows: list[list[int]] = field(default_factory=lambda: [list(range(B))])

    def in_micro_batches(self, number: int) -> Problem:
        size = B // number
        rows = [list(range(i, i + size)) for i in range(0, B, size)]
        return Problem(self.case, self.x, self.weights, self.kept_BT, rows)

    def micro_batches(self, **replaced: torch.Tensor) -> Iterator[dict[str, torch.Tensor | None]]:
        everything = self.x | {"weights": self.weights, "kept_BT": self.kept_BT} | replaced
        for rows in self.rows:
            yield {name: None if value is None else value[rows] for name, value in everything.items()}
