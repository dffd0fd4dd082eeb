"""A plan in words, for a screen of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from grpo.plan.plan import Plan

WIDTH = 80


def short_lines(plan: Plan) -> Iterator[str]:
    """Its figures and whether it fits, without the parts of memory and what was assumed."""
    yield f"{'memory':<16}{_size(plan.peak_bytes):>10}   of {_size(plan.capacity)}, {_machine(plan)}"
    yield from _cost_of_run(plan)
    yield from _verdict(plan)


def lines(plan: Plan) -> Iterator[str]:
    millions = plan.shape.parameters / 1e6
    yield f"{f'{millions:,.0f}' if millions >= 10 else f'{millions:.2g}'} M parameters on {_machine(plan)}"
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _cost_of_run(plan)
    yield ""
    yield "Assumed:"
    for text in plan.assumptions:
        yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    yield ""
    yield from _verdict(plan)


def _cost_of_run(plan: Plan) -> Iterator[str]:
    yield f"{'disk':<16}{_size(plan.disk):>10}"
    if plan.seconds is not None:
        yield from _time(plan)
    if plan.dollars is not None:
        yield f"{'cost':<16}{f'${plan.dollars:.2f}':>10}   at ${plan.price:g} an hour"
    elif plan.hours is not None:
        yield f"{'cost':<16}{'?':>10}   give --price, or training.dollars_per_hour"


def _machine(plan: Plan) -> str:
    return f"{plan.gpus} x {plan.machine}" if plan.gpus > 1 else plan.machine


def _memory(plan: Plan) -> Iterator[str]:
    """A row a part, a column a peak."""
    peaks = {"update": plan.memory.update, "rollout": plan.memory.rollout}
    peaks = {name: parts for name, parts in peaks.items() if parts}
    yield f"{'memory':<16}" + "".join(f"{name:>10}" for name in peaks)
    parts = list(dict.fromkeys(part for of_peak in peaks.values() for part, size in of_peak.items() if size))
    for part in parts:
        yield f"  {part:<14}" + "".join(f"{_size(of_peak.get(part, 0)):>10}" for of_peak in peaks.values())
    totals = "".join(f"{_size(sum(of_peak.values())):>10}" for of_peak in peaks.values())
    yield f"  {'total':<14}{totals}   of {_size(plan.capacity)}"
    if host := sum(plan.memory.host.values()):
        yield f"  {'of the host':<14}{_size(host):>10}"


def _time(plan: Plan) -> Iterator[str]:
    assert plan.seconds is not None
    assert plan.hours is not None
    of_step = {"rollout": plan.seconds.rollout, "update": plan.seconds.update, "other": plan.seconds.other}
    sum_ = " + ".join(f"{name} {_duration(seconds)}" for name, seconds in of_step.items() if seconds)
    yield f"{'a step':<16}{_duration(plan.seconds.step):>10}   {sum_}"
    if plan.evaluations and plan.seconds.evaluation:
        yield f"{'evaluations':<16}{plan.evaluations:>10}   {_duration(plan.seconds.evaluation)} each"
    yield f"{'the run':<16}{_duration(3600 * plan.hours):>10}   {plan.steps} steps"


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.fits:
        yield f"It fits: {_size(plan.peak_bytes)} of {_size(plan.capacity)}."
        return
    yield f"It does not fit: {_size(plan.peak_bytes)} of {_size(plan.capacity)}."
    if plan.cures:
        yield "Each of these lines would make it fit:" if len(plan.cures) > 1 else "This would make it fit:"
        yield from (f"  {' '.join(cure)}" for cure in plan.cures)
    else:
        yield "No change of a few keys makes it fit: take a larger card, more GPUs with --fsdp2, or a smaller model."


def _size(size: float) -> str:
    if not size:
        return "-"
    return f"{size / 1e9:.1f} GB" if size >= 0.1e9 else f"{size / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
