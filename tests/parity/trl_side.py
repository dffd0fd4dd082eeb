"""TRL's own loss code on given tensors: the real ``_compute_loss`` of its trainers, whose model is replaced by the
log-probabilities and entropies that it would have given."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from tests.parity.cases import MAX_LENGTH, Problem

DEFAULTS = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}


class Accelerator:
    """One process; every micro-batch may be the last of its step."""

    num_processes, sync_gradients, is_main_process = 1, True, True

    def gather(self, x: Any) -> Any:
        return x

    def reduce(self, x: Any, reduction: str = "sum") -> Any:
        return x

    def pad_across_processes(self, x: Any, **_: Any) -> Any:
        return x


def stand_in(settings: dict[str, Any], micro_batches: int = 1) -> SimpleNamespace:
    """What ``_compute_loss`` reads of its trainer, at TRL's defaults but for ``settings``."""
    args = SimpleNamespace(**(DEFAULTS | {"use_bias_correction_kl": False} | settings))
    args.steps_per_generation = micro_batches
    trainer = SimpleNamespace(
        **vars(args),
        args=args,
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        epsilon_low=args.epsilon,
        current_gradient_accumulation_steps=micro_batches,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=args.entropy_coef != 0 or args.use_adaptive_entropy,
        _last_world_entropy=float("inf"),
        _entropy_window_stats=None,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.max_completion_length = MAX_LENGTH
    if trainer.epsilon_high is None:
        trainer.epsilon_high = trainer.epsilon
    trainer.get_high_entropy_mask = lambda *given: GRPOTrainer.get_high_entropy_mask(trainer, *given)
    return trainer


def trl_loss(
    problem: Problem, logps_BT: torch.Tensor, entropies_BT: torch.Tensor, trainer: SimpleNamespace | None = None
) -> torch.Tensor:
    """The sum over micro-batches of what TRL would call backward on."""
    case = problem.case
    assert case.trl is not None
    settings = {key: value for key, value in case.trl.items() if key != "trainer"} | {"entropy_coef": case.entropy_coef}
    if case.mode:
        settings |= {"use_vllm": True, "vllm_importance_sampling_correction": True}
    trainer = trainer or stand_in(settings, len(problem.rows))
    total = torch.zeros((), dtype=torch.float64)
    for part in problem.micro_batches(logps_BT=logps_BT, entropies_BT=entropies_BT):
        of_model = part["logps_BT"], part["entropies_BT"], None
        trainer._get_per_token_logps_and_entropies = lambda *_, given=of_model, **__: given
        ids = torch.zeros(part["mask_BT"].shape, dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": torch.ones_like(ids[:, :1]),
            "completion_ids": ids,
            "completion_mask": part["mask_BT"].long(),
            "advantages": part["advantages_B"],
            "num_items_in_batch": problem.x["mask_BT"].sum(),
            "ref_per_token_logps": part["ref_logps_BT"],
            "sampling_per_token_logps": part["sampler_logps_BT"],
        }
        if not case.on_policy:
            inputs["old_per_token_logps"] = part["old_logps_BT"]
            inputs["old_logps"] = (part["old_logps_BT"] * part["mask_BT"]).sum(1)
        if part["weights"] is not None:
            inputs["importance_sampling_ratio"] = part["weights"]
        compute = RLOOTrainer if case.trl.get("trainer") == "rloo" else GRPOTrainer
        total = total + compute._compute_loss(trainer, trainer.model, inputs)
    return total
