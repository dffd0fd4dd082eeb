"""``report.html``: one file, no network, no scripts. Everything that comes from a run is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.errors import printable
from grpo.run.read import mapping, read_rollouts
from grpo.run.screen import duration

if TYPE_CHECKING:
    from grpo.report.curves import Panel
    from grpo.run.read import RunRecord

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
COLUMNS = 4  # evaluations shown side by side
PROMPTS_A_KIND = 6
LONGEST = 20_000  # characters of a completion
# How a prompt fared between the first and the last evaluation shown: key, label.
KINDS = {
    "gained": "newly solved",
    "lost": "lost",
    "kept": "solved before and after",
    "unsolved": "not solved",
}
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


def page(run: RunRecord, facts: Mapping[str, float], curves: list[tuple[Panel, str]]) -> str:
    """The whole document."""
    figures = "".join(
        f"<figure><figcaption><b>{_e(panel.title)}</b> <span>{_e(panel.caption)}</span></figcaption>{svg}</figure>"
        for panel, svg in curves
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{_e(run.name)} · run report</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{_e(run.name)}</h1><p>{_subtitle(run)}</p></header>
<section class="cards">{_cards(run, facts)}</section>
<section><h2>Curves</h2><div class="curves">{figures}</div></section>
{_side_by_side(run)}
<section><h2>How it was made</h2>{_environment(run)}{_recipe(run)}{_all_metrics(run)}</section>
</body>
</html>
"""


def _e(value: Any) -> str:
    """Text that is safe inside HTML, control characters and marks that turn text round made visible."""
    return html.escape(printable(str(value).translate(_CONTROL)))


def _subtitle(run: RunRecord) -> str:
    stage = {"grpo": "GRPO", "sft": "Supervised fine-tuning"}.get(run.setting("stage", ""), "")
    data = run.setting("data.name") or run.setting("data.path") or run.setting("data.hub")
    total = run.number("training.max_steps")
    steps = f"{run.steps} of {total:g} steps" if total and run.steps < total else f"{run.steps} steps"
    seed = run.setting("training.seed")
    parts = [stage, run.setting("model.name"), data, steps, None if seed is None else f"seed {seed}"]
    return " · ".join(_e(part) for part in parts if part)


# ---------------------------------------------------------------------------------------------------------------------
# Headline


def _cards(run: RunRecord, facts: Mapping[str, float]) -> str:
    cards = []
    if "accuracy_before" in facts:
        cards.append(_change("Held-out accuracy", facts, "accuracy", "{:.3f}", _interval(facts)))
    if "length_before" in facts:
        cards.append(_change("Mean completion length", facts, "length", "{:.0f}", "tokens"))
    if "reward_before" in facts:
        cards.append(_change("Training reward", facts, "reward", "{:.3f}", "mean of the first and last 5% of steps"))
    elif "loss_before" in facts:
        cards.append(_change("Loss", facts, "loss", "{:.3f}", "nats per token"))
    if "seconds" in facts:
        notes = [f"{facts['steps']:,.0f} steps"]
        notes += [f"{_large(facts['tokens'])} tokens"] if "tokens" in facts else []
        notes += [f"{_large(facts['tokens_per_second'])} tokens/s"] if "tokens_per_second" in facts else []
        notes += [f"${facts['cost_usd']:,.2f}"] if "cost_usd" in facts else []
        cards.append(_card("Training time", duration(facts["seconds"]), ", ".join(notes)))
    return "".join(cards)


def _change(title: str, facts: Mapping[str, float], name: str, form: str, note: str) -> str:
    before, after = form.format(facts[f"{name}_before"]), form.format(facts[f"{name}_after"])
    return _card(title, f"{before} → {after}", note)


def _card(title: str, value: str, note: str) -> str:
    return f'<div class="card"><h3>{_e(title)}</h3><p class="value">{_e(value)}</p><p class="note">{_e(note)}</p></div>'


def _interval(facts: Mapping[str, float]) -> str:
    if "accuracy_low_before" not in facts or "accuracy_high_before" not in facts:
        return ""
    ends = [f"[{facts[f'accuracy_low_{w}']:.3f}, {facts[f'accuracy_high_{w}']:.3f}]" for w in ("before", "after")]
    return f"95% interval {ends[0]} → {ends[1]}"


def _large(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


# ---------------------------------------------------------------------------------------------------------------------
# The same prompts at different steps


@dataclass(frozen=True)
class Attempts:
    """A held-out prompt's completions at one evaluation; ``row`` is its first sample."""

    row: dict[str, Any]
    solved: int
    samples: int


def _side_by_side(run: RunRecord) -> str:
    files = run.eval_rollouts()
    steps = _spread(list(files), COLUMNS)
    attempts = {step: _attempts(run, files[step]) for step in steps}
    attempts = {step: found for step, found in attempts.items() if found}
    title = "<section><h2>The same prompts at different steps</h2>"
    if not attempts:
        return f'{title}<p class="note">This run kept no held-out completions (rollouts/eval_*.jsonl).</p></section>'
    common = sorted(set.intersection(*(set(found) for found in attempts.values())))
    first, last = attempts[min(attempts)], attempts[max(attempts)]
    kinds = {prompt: _kind(first[prompt], last[prompt]) for prompt in common}
    shown = [p for kind in KINDS for p in [q for q in common if kinds[q] == kind][:PROMPTS_A_KIND]]
    counts = {kind: list(kinds.values()).count(kind) for kind in KINDS}
    filters = "".join(
        f'<input type="radio" name="kind" id="kind-{kind}"{" checked" if kind == "all" else ""}>'
        f'<label for="kind-{kind}">{_e(label)} <b>{n}</b></label>'
        for kind, label, n in [("all", "all", len(common)), *((k, KINDS[k], counts[k]) for k in KINDS)]
    )
    prompts = "".join(
        _prompt(kinds[prompt], {step: found[prompt] for step, found in attempts.items()}) for prompt in sorted(shown)
    )
    return (
        f"{title}<p>{len(common):,} held-out prompts were answered at every evaluation shown. "
        f"Below are the first {PROMPTS_A_KIND} of each kind by row number, not by looks; the counts are of all.</p>"
        f'<div class="prompts" style="--columns: {len(attempts)}">{filters}{prompts}</div></section>'
    )


def _spread(items: list[int], count: int) -> list[int]:
    """At most ``count`` items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _attempts(run: RunRecord, file: Path) -> dict[int, Attempts]:
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in read_rollouts(file):
        by_prompt.setdefault(row.get("prompt_id", -1), []).append(row)
    return {
        prompt: Attempts(min(rows, key=lambda row: row.get("sample", 0)), sum(_solved(run, r) for r in rows), len(rows))
        for prompt, rows in by_prompt.items()
    }


def _solved(run: RunRecord, row: Mapping[str, Any]) -> bool:
    """As evaluation counts: the recipe's evaluation reward, or the first one, is at least 1."""
    rewards = row.get("rewards") or {"": row.get("reward")}
    name = run.setting("evaluation.reward")
    value = rewards[name] if name in rewards else next(iter(rewards.values()))
    return value is not None and value >= 1


def _kind(first: Attempts, last: Attempts) -> str:
    before, after = first.solved * 2 >= first.samples, last.solved * 2 >= last.samples
    return {(False, True): "gained", (True, False): "lost", (True, True): "kept", (False, False): "unsolved"}[
        before, after
    ]


def _prompt(kind: str, attempts: Mapping[int, Attempts]) -> str:
    row = next(iter(attempts.values())).row
    columns = "".join(
        f"<span>{_e(name)} <b>{_e(_short(value))}</b></span>" for name, value in (row.get("columns") or {}).items()
    )
    cells = "".join(_cell(step, attempt) for step, attempt in attempts.items())
    return (
        f'<article class="{kind}"><header><span class="id">#{_e(row.get("prompt_id", ""))}</span>{columns}</header>'
        f'<pre class="prompt">{_e(row.get("prompt", ""))}</pre><div class="cells">{cells}</div></article>'
    )


def _cell(step: int, attempt: Attempts) -> str:
    row = attempt.row
    reward = row.get("reward")
    if attempt.samples > 1:
        verdict = f"{attempt.solved} of {attempt.samples} solved"
    else:
        verdict = "unscored" if reward is None else "solved" if attempt.solved else "not solved"
    colour = "bad" if reward is not None else "unknown"
    colour = "good" if attempt.solved * 2 >= attempt.samples else colour
    notes = [f"{row.get('num_tokens', '?')} tokens"]
    notes += [] if reward is None else [f"reward {reward:g}"]
    notes += ["cut off"] if row.get("status") == "length" else []
    return (
        f'<div class="cell {colour}"><h4>step {step} <span class="verdict">{verdict}</span></h4>'
        f'<p class="note">{_e(" · ".join(notes))}</p><pre>{_completion(str(row.get("completion", "")))}</pre></div>'
    )


def _completion(text: str) -> str:
    """Escaped, with the answer marked and tags dimmed."""
    left_out = len(text) - LONGEST
    if left_out > 0:
        text = f"{text[: LONGEST // 2]}\n[… {left_out:,} characters …]\n{text[-LONGEST // 2 :]}"
    escaped = _e(text)
    return re.sub(r"&lt;/?(?:think|answer)&gt;", r"<i>\g<0></i>", _marked(escaped))


def _marked(escaped: str) -> str:
    """The text with its answers marked, each from a tag that opens to the next that closes. In one pass: a model may
    open thousands and close none."""
    opens, closes, parts, at = "&lt;answer&gt;", "&lt;/answer&gt;", [], 0
    while (start := escaped.find(opens, at)) >= 0 and (end := escaped.find(closes, start)) >= 0:
        end += len(closes)
        parts += [escaped[at:start], "<mark>", escaped[start:end], "</mark>"]
        at = end
    return "".join([*parts, escaped[at:]])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


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
    return _table((name, value) for name, value in rows.items() if value)


def _recipe(run: RunRecord) -> str:
    if not run.recipe_text:
        return '<p class="note">recipe.yaml is missing.</p>'
    return f"<details open><summary>Recipe</summary><pre>{_e(run.recipe_text)}</pre></details>"


def _all_metrics(run: RunRecord) -> str:
    rows = []
    for name in sorted(run.names()):
        steps, values = run.series(name)
        if len(steps):
            rows.append((name, f"{values[0]:.5g} → {values[-1]:.5g}"))
    return f"<details><summary>All metrics, first → last</summary>{_table(rows)}</details>"


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    return "<table>" + "".join(f"<tr><th>{_e(name)}</th><td>{_e(value)}</td></tr>" for name, value in rows) + "</table>"
