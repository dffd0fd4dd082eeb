"""Every loss as its paper writes it, in plain Python loops over floats, and its gradient by finite differences.

``now`` are the log-probabilities that move; ``at`` those at the point where the gradient is taken, which is what a
weight without gradient is made of. Written apart from ``grpo.losses``, which is not imported.
"""

from __future__ import annotations

import math
from typing import Any

from tests.parity.cases import MAX_LENGTH, WINDOW, Problem

Row = list[list[float]]


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def reference_weights(x: dict[str, Any], mode: str) -> Row:
    """The factor of each token (1 where nothing counts), by the definition of its mode."""
    old, sampler, tokens = x["old_logps_BT"].tolist(), x["sampler_logps_BT"].tolist(), tokens_of(x)
    level, bound = mode.split("_")
    weights = [[1.0] * len(row) for row in old]
    for b, places in enumerate(tokens):
        for t in places:
            own = [t] if level == "token" else places
            ratio = math.exp(sum(old[b][u] - sampler[b][u] for u in own))
            inside = WINDOW["clip_min"] <= ratio <= WINDOW["clip_max"]
            cut = clip(ratio, WINDOW["clip_min"], WINDOW["clip_max"]) if bound == "truncate" else 0.0
            weights[b][t] = ratio if inside else cut
    return weights


def tokens_of(x: dict[str, Any]) -> list[list[int]]:
    return [[t for t, m in enumerate(row) if m > 0] for row in x["mask_BT"].tolist()]


def reference_loss(problem: Problem, now: Row, entropies: Row) -> float:
    """The loss at ``now``, in as many micro-batches as the problem has."""
    x, options = problem.x, {"loss_type": "dapo", "epsilon": 0.2, "beta": 0.0} | problem.case.options
    at = x["logps_BT"].tolist()
    old = at if problem.case.on_policy else x["old_logps_BT"].tolist()
    tokens, advantages = tokens_of(x), x["advantages_B"].tolist()
    weights = reference_weights(x, problem.case.mode) if problem.case.mode else None
    kept = problem.kept_BT.tolist() if problem.kept_BT is not None else None

    per_token: Row = []  # at tokens that count, in order
    for b, places in enumerate(tokens):
        of_sequence = now[b], at[b], old[b], weights[b] if weights else None
        one_weight = (problem.case.mode or "").startswith("sequence")
        sequence = _Sequence(options, advantages[b], places, *of_sequence, one_weight)
        drift = sum(x["sampler_logps_BT"][b, t].item() - at[b][t] for t in places) / len(places)
        threshold = options.get("off_policy_mask_threshold")
        masked = threshold is not None and advantages[b] < 0 and drift > threshold
        row = []
        for t in places:
            value = sequence.policy_term(t, kept[b][t] if kept else 1.0)
            value = 0.0 if masked else value
            if options["beta"] > 0:
                value += options["beta"] * sequence.kl_term(t, x["ref_logps_BT"][b, t].item())
            row.append(value)
        per_token.append(row)
    bonus, acting = 0.0, 0
    for b, places in enumerate(tokens):
        for t in places:
            if not kept or kept[b][t]:
                bonus, acting = bonus + entropies[b][t], acting + 1
    return reduced(options["loss_type"], per_token, problem.rows) - problem.case.entropy_coef * bonus / acting


def reduced(loss_type: str, per_token: Row, rows: list[list[int]]) -> float:
    """Sums and divisors."""
    sums, lengths = [sum(row) for row in per_token], [len(row) for row in per_token]
    if loss_type in ("grpo", "gspo", "sapo", "rloo"):  # the mean over sequences of their means
        return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    if loss_type == "dr_grpo":
        return sum(sums) / (len(sums) * MAX_LENGTH)
    if loss_type in ("luspo", "reinforce"):  # the mean over sequences of their sums
        return sum(sums) / len(sums)
    if loss_type == "bnpo":
        return sum(sum(sums[b] for b in part) / sum(lengths[b] for b in part) for part in rows) / len(rows)
    return sum(sums) / sum(lengths)


class _Sequence:
    """One completion: the numbers in the formulas, by their places in it."""

    def __init__(self, options, advantage, places, now, at, old, weights, one_weight):
        self.one_weight = one_weight  # the sampler's weight is the completion's, the same at each of its tokens
        self.options, self.advantage, self.places = options, advantage, places
        self.now, self.at, self.old, self.weights = now, at, old, weights

    def ratio(self, t: int, logps: list[float] | None = None) -> float:
        """pi / pi_old at the level of the case."""
        logps = self.now if logps is None else logps
        level = self.options.get("importance_sampling_level")
        level = level or ("sequence" if self.options["loss_type"] in ("gspo", "luspo") else "token")
        if level == "token":
            return math.exp(logps[t] - self.old[t])
        n = len(self.places)
        if level == "sequence":
            return math.exp(sum(logps[u] - self.old[u] for u in self.places) / n)
        frozen = math.exp(sum(self.at[u] - self.old[u] for u in self.places) / n)
        return frozen * math.exp(logps[t] - self.at[t])

    def policy_term(self, t: int, kept: float) -> float:
        name, advantage = self.options["loss_type"], self.advantage
        weight = self.weights[t] if self.weights and name != "vespo" else 1.0
        if name == "kl_cov":
            value = -self.ratio(t) * advantage
            return weight * (value + (1 - kept) * self.options["ppo_kl_coef"] * abs(self.now[t] - self.old[t]))
        return kept * weight * self._plain(name, t)

    def _plain(self, name: str, t: int) -> float:
        advantage, options = self.advantage, self.options
        if name == "reinforce":
            return -advantage * self.now[t]
        if name == "cispo":
            return -min(self.ratio(t, self.at), options["epsilon_high"]) * advantage * self.now[t]
        if name == "vespo":
            return -self._phi() * advantage * self.now[t]
        if name == "sapo":
            tau = 1.0 if advantage > 0 else 1.05
            return -(4 / tau) / (1 + math.exp(-tau * (self.ratio(t) - 1))) * advantage
        ratio = self.ratio(t)
        if name == "rloo":  # the whole completion is one action
            ratio = math.exp(sum(self.now[u] - self.old[u] for u in self.places))
        low, high = options["epsilon"], options.get("epsilon_high") or options["epsilon"]
        bounded = min(ratio, options["delta"]) if options.get("delta") else ratio
        return -min(bounded * advantage, clip(ratio, 1 - low, 1 + high) * advantage)

    def _phi(self) -> float:
        log_w = sum(self.at[u] - self.old[u] for u in self.places)
        if self.weights:
            logs = [math.log(max(self.weights[u], 1e-8)) for u in self.places]
            log_w += logs[0] if self.one_weight else sum(logs)
        w = math.exp(clip(log_w, math.log(1e-8), 20))
        k, decay = (2.0, 3.0) if self.advantage >= 0 else (3.0, 2.0)
        return math.exp(decay) * w**k * math.exp(-decay * w)

    def kl_term(self, t: int, ref: float) -> float:
        d = ref - self.now[t]
        value = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[self.options.get("kl_estimator", "k3")]
        return value * self.ratio(t) if self.options.get("use_bias_correction_kl") else value


def reference_selection(problem: Problem) -> set[tuple[int, int]]:
    """Which tokens the covariance losses may select: for ``kl_cov`` exactly those, for ``clip_cov`` the candidates."""
    x, options = problem.x, problem.case.options
    logps, old, advantages = x["logps_BT"].tolist(), x["old_logps_BT"].tolist(), x["advantages_B"].tolist()
    places = [(b, t) for b, row in enumerate(tokens_of(x)) for t in row]
    mean_logp = sum(logps[b][t] for b, t in places) / len(places)
    mean_advantage = sum(advantages[b] for b, _ in places) / len(places)
    cov = {(b, t): (logps[b][t] - mean_logp) * (advantages[b] - mean_advantage) for b, t in places}
    if options["loss_type"] == "kl_cov":
        number = max(int(options["kl_cov_ratio"] * len(places)), 1)
        return set(sorted(places, key=lambda place: cov[place])[-number:])
    candidates = set()
    for b, t in places:
        ratio = math.exp(logps[b][t] - old[b][t])
        clipped = ratio > 1.2 if advantages[b] > 0 else ratio < 0.8
        if options["clip_cov_lb"] < cov[b, t] < options["clip_cov_ub"] and not clipped:
            candidates.add((b, t))
    return candidates


def reference_gradient(problem: Problem, step: float = 1e-6) -> tuple[list[float], float]:
    """The gradient by log-probabilities and then by entropies of the tokens that count, and the loss."""
    logps, entropies = problem.x["logps_BT"].tolist(), problem.x["entropies_BT"].tolist()
    gradient = []
    for table in (logps, entropies):
        for b, places in enumerate(tokens_of(problem.x)):
            for t in places:
                there = table[b][t]
                table[b][t] = there + step
                up = reference_loss(problem, logps, entropies)
                table[b][t] = there - step
                down = reference_loss(problem, logps, entropies)
                table[b][t] = there
                gradient.append((up - down) / (2 * step))
    return gradient, reference_loss(problem, logps, entropies)
