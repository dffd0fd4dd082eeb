"""``report.html``: one file, no network, no scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo.config.given import given
from grpo.report.attempts import side_by_side
from grpo.report.judgement import Gain, gain, judgement
from grpo.report.markup import document, e, in_words, large, short, table
from grpo.run.fields import COST, dollars, duration
from grpo.run.read import mapping

if TYPE_CHECKING:
    from grpo.report.curves import Panel
    from grpo.run.read import RunRecord

REFRESH = '<meta http-equiv="refresh" content="20">\n'  # of a run that is going on


def page(run: RunRecord, facts: Mapping[str, float], curves: list[tuple[Panel, str]], *, running: bool = False) -> str:
    """The whole document."""
    figures = [_figure(panel, svg) for panel, svg in curves]
    leading, others = figures[:1], figures[1:]  # accuracy's, where there is one
    found = gain(run)
    body = f"""<header><h1>{e(run.name)}</h1><p>{_subtitle(run)}</p></header>
<section class="lead{"" if leading else " alone"}">
<div>{_headline(facts, found)}{_findings(run, running)}</div>
{"".join(leading)}
</section>
<section class="cards">{_cards(facts)}</section>
<section><h2>Curves</h2><div class="curves">{"".join(others)}</div></section>
{side_by_side(run) if run.setting("stage") != "sft" else ""}
<section><h2>How it was made</h2>{_environment(run)}{_recipe(run)}{_all_metrics(run)}</section>"""
    return document(f"{run.name} · run report", body, REFRESH if running else "")


def _figure(panel: Panel, svg: str) -> str:
    caption = f"<figcaption><b>{e(panel.title)}</b> <span>{e(panel.caption)}</span></figcaption>"
    return f"<figure>{caption}{svg}</figure>"


def _subtitle(run: RunRecord) -> str:
    stage = {"grpo": "GRPO", "sft": "Supervised fine-tuning"}.get(run.setting("stage", ""), "")
    data = run.setting("data.name") or run.setting("data.path") or run.setting("data.hub")
    total = run.number("training.max_steps")
    steps = f"{run.steps} of {total:g} steps" if total and run.steps < total else f"{run.steps} steps"
    seed = run.setting("training.seed")
    parts = [stage, run.setting("model.name"), data, steps, None if seed is None else f"seed {seed}"]
    return " · ".join(e(part) for part in parts if part)


# ---------------------------------------------------------------------------------------------------------------------
# Headline


def _headline(facts: Mapping[str, float], found: Gain | None) -> str:
    """Accuracy, large, with what it has gained; of a run without, its loss or its reward."""
    if found is not None:
        low, high = found.low, found.high
        change = (
            f'<p class="gain {found.tone}"><b>{found.difference:+.3f}</b> '
            f"<span>95% interval [{low:+.3f}, {high:+.3f}], {e(found.how)}</span></p>"
        )
        return f"{_big('Held-out accuracy', found.before, found.after, found.tone)}{change}"
    if "accuracy_before" in facts:
        return _big("Held-out accuracy", facts["accuracy_before"], facts["accuracy_after"])
    for title, name in (("Training reward", "reward"), ("Divergence from the teacher", "teacher"), ("Loss", "loss")):
        if f"{name}_before" in facts:
            return _big(title, facts[f"{name}_before"], facts[f"{name}_after"])
    return ""


def _big(title: str, before: float, after: float, tone: str = "plain") -> str:
    return f'<div class="{tone}"><h2>{e(title)}</h2><p class="big">{before:.3f} → {after:.3f}</p></div>'


def _findings(run: RunRecord, running: bool) -> str:
    found = judgement(run, running=running)
    names = [f"<b>{e(one.name)}</b> " if one.name else "" for one in found]
    items = [f'<li class="{one.tone}">{name}{in_words(one.text)}</li>' for name, one in zip(names, found, strict=True)]
    return f'<ul class="findings">{"".join(items)}</ul>'


def _cards(facts: Mapping[str, float]) -> str:
    cards = []
    if "length_before" in facts:
        cards.append(_change("Mean completion length", facts, "length", "{:.0f}", "tokens"))
    if "turns_before" in facts:
        cards.append(_change("Turns of an episode", facts, "turns", "{:.1f}", "mean"))
    if "calls_before" in facts:
        cards.append(_change("Tool calls", facts, "calls", "{:.2f}", "an episode"))
    if "reward_before" in facts:
        cards.append(_change("Training reward", facts, "reward", "{:.3f}", "mean of the first and last 5% of steps"))
    if "teacher_before" in facts:
        cards.append(_change("Divergence from the teacher", facts, "teacher", "{:.3f}", "nats a token"))
    if "seconds" in facts:
        notes = [f"{facts['steps']:,.0f} steps"]
        notes += [f"{large(facts['tokens'])} tokens"] if "tokens" in facts else []
        notes += [f"{large(facts['tokens_per_second'])} tokens/s"] if "tokens_per_second" in facts else []
        cards.append(_card("Training time", duration(facts["seconds"]), ", ".join(notes)))
    if COST in facts:
        steps = facts.get("cost_usd")
        note = "by wall-clock time" + (f", {dollars(steps)} of it in steps" if steps is not None else "")
        cards.append(_card("Cost", f"${facts[COST]:,.2f}", note))
    elif "cost_usd" in facts:
        cards.append(_card("Cost", f"${facts['cost_usd']:,.2f}", "of the steps alone"))
    return "".join(cards)


def _change(title: str, facts: Mapping[str, float], name: str, form: str, note: str) -> str:
    before, after = form.format(facts[f"{name}_before"]), form.format(facts[f"{name}_after"])
    return _card(title, f"{before} → {after}", note)


def _card(title: str, value: str, note: str) -> str:
    return f'<div class="card"><h3>{e(title)}</h3><p class="value">{e(value)}</p><p class="note">{e(note)}</p></div>'


# ---------------------------------------------------------------------------------------------------------------------
# Details


def _environment(run: RunRecord) -> str:
    facts = run.environment
    if not facts:
        return '<p class="note">environment.json is missing: where this ran is not known.</p>'
    cpu, source, packages = (mapping(facts.get(name)) for name in ("cpu", "source", "packages"))
    listed: Any = facts.get("gpus")
    found = listed if isinstance(listed, list) else []
    gpus = [f"{mapping(gpu).get('name')} ({mapping(gpu).get('memory_gb')} GB)" for gpu in found]
    commit = f"{str(source.get('commit', ''))[:12]}{' (modified)' if source.get('modified') else ''}" if source else ""
    rows = {
        "Command": facts.get("command"),
        "Started": facts.get("started"),
        "Source": commit,
        "Processor": f"{cpu.get('model')}, {cpu.get('cores')} cores, {cpu.get('memory_gb')} GB" if cpu else None,
        "GPUs": ", ".join(gpus),
        "Python": facts.get("python"),
        "Packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    return table((name, value) for name, value in rows.items() if value)


def _recipe(run: RunRecord) -> str:
    if not run.recipe_text:
        return '<p class="note">recipe.yaml is missing.</p>'
    rows = table((name, short(value, 300)) for name, value in given(run.recipe).items())
    whole = f"<details><summary>The whole recipe</summary><pre>{e(run.recipe_text)}</pre></details>"
    return f"<h3>What the recipe says beside the defaults</h3>{rows}{whole}"


def _all_metrics(run: RunRecord) -> str:
    rows = []
    for name in sorted(run.names()):
        steps, values = run.series(name)
        if len(steps):
            rows.append((name, f"{values[0]:.5g} → {values[-1]:.5g}"))
    return f"<details><summary>All metrics, first → last</summary>{table(rows)}</details>"
