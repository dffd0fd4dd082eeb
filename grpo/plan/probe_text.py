"""A probe in words, for the screen and as a page."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator
from typing import Any

from grpo.plan.probe import Probe

WIDTH = 80
SHOWN = 8  # completions on the page
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;padding:.6rem;border:1px solid #8886}"
)


def lines(probe: Probe, next_step: str) -> Iterator[str]:
    """``next_step`` is the command that says what a run with these lengths takes."""
    yield from figure_lines(probe)
    yield ""
    if probe.goes:
        yield "Go: nothing speaks against it."
    for finding in probe.findings:
        yield from _wrapped(f"{finding.name}: {finding.text}.", "")
        yield from _wrapped(f"{finding.cure}.", "  ")
    yield ""
    yield "What a run with these lengths takes:"
    yield f"  {next_step}"


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
    sources = {name.split("/")[1] for name in probe.by_source}
    for source in sorted(sources):
        of_source = {name.rpartition("/")[2]: v for name, v in probe.by_source.items() if name.split("/")[1] == source}
        rows[source] = (
            f"{of_source['prompts']:.0f} prompts, pass@1 {of_source.get('accuracy', 0):.3f}, "
            f"{1 - of_source['frac_reward_zero_std']:.0%} of groups with a signal, "
            f"{of_source['mean_length']:.0f} tokens"
        )
    for name, text in rows.items():
        yield from textwrap.wrap(f"{name:<16}{text}", WIDTH, subsequent_indent=" " * 16)


def page(probe: Probe, title: str) -> str:
    """A self-contained page: figures, findings, and some completions, the best paid and the worst first."""
    text = "\n".join(figure_lines(probe))
    verdict = "".join(
        f"<p><b>{html.escape(one.name)}</b>: {html.escape(one.text)}. <i>{html.escape(one.cure)}.</i></p>"
        for one in probe.findings
    )
    ordered = sorted(probe.rows, key=lambda row: -(row["reward"] if row["reward"] is not None else float("-inf")))
    shown = ordered[: SHOWN // 2] + ordered[len(ordered) - SHOWN // 2 :] if len(ordered) > SHOWN else ordered
    return (
        f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<pre>{html.escape(text)}</pre>{verdict or '<p><b>Go</b>: nothing speaks against it.</p>'}"
        f"<h2>Completions, best and worst paid</h2>{''.join(map(_completion, shown))}"
    )


def _completion(row: dict[str, Any]) -> str:
    said = f"reward {row['reward']}, {row['num_tokens']} tokens, ended by {row['status']}"
    return f"<p>{html.escape(said)}</p><pre>{html.escape(row['prompt'])}<b>{html.escape(row['completion'])}</b></pre>"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
