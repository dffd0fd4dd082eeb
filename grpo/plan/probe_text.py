"""A probe in words, for the screen and as a page."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator
from typing import Any

from grpo.plan.probe import Probe
from grpo.plan.text import short_lines

WIDTH = 80
SHOWN = 8  # completions on the page
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;padding:.6rem;border:1px solid #8886}"
)


def lines(probe: Probe, next_step: str) -> Iterator[str]:
    """``next_step`` is the command that says more of what a run with these lengths takes."""
    yield from figure_lines(probe)
    yield ""
    if probe.goes:
        yield verdict(probe)
    for finding in probe.findings:
        yield from _wrapped(f"{finding.name}: {finding.text}.", "")
        yield from _wrapped(f"{finding.cure}.", "  ")
    yield ""
    yield from plan_lines(probe)
    yield "In full, and for other machines (--gpu):"
    yield f"  {next_step}"


def verdict(probe: Probe) -> str:
    """Of a probe that goes."""
    if probe.plan is not None and not probe.plan.fits:
        return "Go, on a machine with more memory: nothing else speaks against it."
    return "Go: nothing speaks against it."


def plan_lines(probe: Probe) -> Iterator[str]:
    yield "A run with these lengths and this share of groups:"
    if probe.plan is None:
        yield from _wrapped(f"nothing is known here of what it takes: {probe.no_plan}.", "  ")
        return
    for line in short_lines(probe.plan):
        yield from textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ", drop_whitespace=False)


def figure_lines(probe: Probe) -> Iterator[str]:
    f = probe.figures
    yield f"{f.groups} prompts, {f.completions} completions, {f.seconds:.1f} s to sample and score"
    yield ""
    share = f"{f.with_signal:.0%} of groups [{f.signal_low:.0%}, {f.signal_high:.0%}]"
    rows = {
        "with a signal": share,
        "pass@1": f"{f.accuracy:.3f} [{f.accuracy_low:.3f}, {f.accuracy_high:.3f}]",
        f"pass@{f.completions // max(f.groups, 1)}": f"{f.pass_at_G:.3f}",
        "reward": f"{f.reward:.3f}" + (f", {f.unscored:.0%} without one" if f.unscored else ""),
        "verdicts": ", ".join(f"{name} {count:.0%}" for name, count in f.verdicts.items()) or "none given",
        "length": f"{f.mean_length:.0f} tokens, {f.cut_off:.0%} cut off",
        "different": f"{f.unique:.0%} of a group's completions",
        "entropy": f"{f.entropy:.3f} nats a token",
        "sampler": f"{f.sampler_difference:.2g} nats a token from the trainer",
    }
    for name, text in rows.items():
        yield from textwrap.wrap(f"{name:<16}{text}", WIDTH, subsequent_indent=" " * 16)


def page(probe: Probe, title: str) -> str:
    """A self-contained page: figures, findings, and some completions, the best paid and the worst first."""
    text = "\n".join(figure_lines(probe))
    taken = "\n".join(plan_lines(probe))
    found = "".join(
        f"<p><b>{html.escape(one.name)}</b>: {html.escape(one.text)}. <i>{html.escape(one.cure)}.</i></p>"
        for one in probe.findings
    )
    ordered = sorted(probe.rows, key=lambda row: -(row["reward"] if row["reward"] is not None else float("-inf")))
    shown = ordered[: SHOWN // 2] + ordered[len(ordered) - SHOWN // 2 :] if len(ordered) > SHOWN else ordered
    return (
        f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<pre>{html.escape(text)}</pre>{found or f'<p><b>{html.escape(verdict(probe))}</b></p>'}"
        f"<pre>{html.escape(taken)}</pre>"
        f"<h2>Completions, best and worst paid</h2>{''.join(map(_completion, shown))}"
    )


def _completion(row: dict[str, Any]) -> str:
    said = f"reward {row['reward']}, {row['num_tokens']} tokens, ended by {row['status']}"
    return f"<p>{html.escape(said)}</p><pre>{html.escape(row['prompt'])}<b>{html.escape(row['completion'])}</b></pre>"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
