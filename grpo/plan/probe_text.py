"""A probe in words, for the screen and as a page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from grpo.plan.probe import Probe
from grpo.plan.text import short_lines
from grpo.report.conversation import notes_of, said
from grpo.report.markup import document, e, in_words, table

WIDTH = 80
SHOWN = 8  # completions on the page


def lines(probe: Probe, next_step: str) -> Iterator[str]:
    """``next_step`` is the command that says more of what a run with these lengths takes."""
    yield from figure_lines(probe)
    yield ""
    if probe.goes:
        yield f"Go: {verdict(probe)}."
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
        return "on a machine with more memory; nothing else speaks against it"
    return "nothing speaks against it"


def plan_lines(probe: Probe) -> Iterator[str]:
    yield "A run with these lengths and this share of groups:"
    if probe.plan is None:
        yield from _wrapped(f"nothing is known here of what it takes: {probe.no_plan}.", "  ")
        return
    for line in short_lines(probe.plan):
        yield from textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ", drop_whitespace=False)


def figure_lines(probe: Probe) -> Iterator[str]:
    yield _sampled(probe)
    yield ""
    for name, text in figures(probe).items():
        yield from textwrap.wrap(f"{name:<16}{text}", WIDTH, subsequent_indent=" " * 16)


def figures(probe: Probe) -> dict[str, str]:
    """Each figure's name and its text."""
    f = probe.figures
    return {
        "with a signal": f"{f.with_signal:.0%} of groups [{f.signal_low:.0%}, {f.signal_high:.0%}]",
        "pass@1": f"{f.accuracy:.3f} [{f.accuracy_low:.3f}, {f.accuracy_high:.3f}]",
        f"pass@{f.completions // max(f.groups, 1)}": f"{f.pass_at_G:.3f}",
        "reward": f"{f.reward:.3f}" + (f", {f.unscored:.0%} without one" if f.unscored else ""),
        "verdicts": ", ".join(f"{name} {count:.0%}" for name, count in f.verdicts.items()) or "none given",
        "length": f"{f.mean_length:.0f} tokens, {f.cut_off:.0%} cut off",
        "different": f"{f.unique:.0%} of a group's completions",
        "entropy": f"{f.entropy:.3f} nats a token",
        "sampler": f"{f.sampler_difference:.2g} nats a token from the trainer",
        **_of_sources(probe),
    }


def _of_sources(probe: Probe) -> dict[str, str]:
    found = {}
    for source in sorted({name.split("/")[1] for name in probe.by_source}):
        of_source = {name.rpartition("/")[2]: v for name, v in probe.by_source.items() if name.split("/")[1] == source}
        found[source] = (
            f"{of_source['prompts']:.0f} prompts, pass@1 {of_source.get('accuracy', 0):.3f}, "
            f"{1 - of_source['frac_reward_zero_std']:.0%} of groups with a signal, "
            f"{of_source['mean_length']:.0f} tokens"
        )
    return found


def _sampled(probe: Probe) -> str:
    f = probe.figures
    return f"{f.groups} prompts, {f.completions} completions, {f.seconds:.1f} s to sample and score"


def page(probe: Probe, title: str) -> str:
    """A page of the look of a run's report: the verdict, what speaks against a run, figures, and some completions, the
    best paid and the worst."""
    found = "".join(
        f'<li class="bad"><b>{e(one.name)}</b> {in_words(f"{one.text}. {one.cure[:1].upper()}{one.cure[1:]}.")}</li>'
        for one in probe.findings
    )
    goes = verdict(probe)
    said = found or f'<li class="good">{e(goes[:1].upper() + goes[1:])}.</li>'
    ordered = sorted(probe.rows, key=lambda row: -(row["reward"] if row["reward"] is not None else float("-inf")))
    best, worst = _of_each_prompt(ordered)[: SHOWN // 2], _of_each_prompt(ordered[::-1])[: SHOWN // 2]
    shown = best + [row for row in reversed(worst) if not any(row is other for other in best)]
    body = f"""<header><h1>{e(title)}</h1><p>{e(_sampled(probe))}</p></header>
<section class="lead alone"><div><h2>Will it learn?</h2><p class="big">{"Go" if probe.goes else "Not yet"}</p>
<ul class="findings">{said}</ul></div></section>
<section><h2>Figures</h2>{table(figures(probe).items())}</section>
<section><h2>What a run takes</h2><pre>{e(chr(10).join(plan_lines(probe)))}</pre></section>
<section class="prompts" style="--columns: 1"><h2>Completions, the best paid and the worst</h2>
{"".join(map(_completion, shown))}</section>"""
    return document(title, body)


def _of_each_prompt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each prompt, in their order."""
    return list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]


def _completion(row: dict[str, Any]) -> str:
    reward = row["reward"]
    tone = "unknown" if reward is None else "good" if reward >= 1 else "bad"
    paid = "unscored" if reward is None else f"reward {reward:g}"
    notes = f"{row['num_tokens']} tokens" + (" · cut off" if row["status"] == "length" else "")
    notes = " · ".join([notes, *notes_of(row)])
    return (
        f'<article><pre class="prompt">{e(row["prompt"])}</pre><div class="cells"><div class="cell {tone}">'
        f'<p class="note"><span class="verdict">{e(paid)}</span> {e(notes)}</p>'
        f"{said(row)}</div></div></article>"
    )


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
