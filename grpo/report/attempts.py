"""What a policy answered to the same held-out prompts: at the first and the last evaluation of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.report.conversation import notes_of, said
from grpo.report.markup import common_prefix, cut, e, short
from grpo.run.read import RunRecord, read_rollouts

PROMPTS_A_KIND = 6
# How a prompt fared between two evaluations: key, label.
KINDS = {
    "gained": "newly solved",
    "lost": "lost",
    "unsolved": "not solved",
    "kept": "solved before and after",
}


@dataclass(frozen=True)
class Attempts:
    """A held-out prompt's completions at one evaluation; ``row`` is its first sample. Unscored completions count as
    not solved, and ``scored`` is False where there is one."""

    row: dict[str, Any]
    solved: int
    samples: int
    scored: bool

    @property
    def share(self) -> float:
        return self.solved / self.samples


def ends(run: RunRecord) -> tuple[dict[int, Attempts], dict[int, Attempts]]:
    """The attempts at the first and the last evaluation that kept its completions, by prompt id; those of prompts that
    both answered. Empty where there are not two."""
    files = run.eval_rollouts()
    found = [(step, attempts(run, files[step])) for step in dict.fromkeys([*list(files)[:1], *list(files)[-1:]])]
    found = [(step, answered) for step, answered in found if answered]
    if len(found) < 2:
        return {}, {}
    (_, first), (_, last) = found
    common = sorted(first.keys() & last.keys())
    return {p: first[p] for p in common}, {p: last[p] for p in common}


def attempts(run: RunRecord, file: Path) -> dict[int, Attempts]:
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in read_rollouts(file):
        by_prompt.setdefault(row.get("prompt_id", -1), []).append(row)
    return {
        prompt: Attempts(
            min(rows, key=lambda row: row.get("sample", 0)),
            sum(_value(run, row) >= 1 for row in rows),
            len(rows),
            all(_value(run, row) == _value(run, row) for row in rows),
        )
        for prompt, rows in by_prompt.items()
    }


def _value(run: RunRecord, row: Mapping[str, Any]) -> float:
    """What evaluation looks at: the recipe's evaluation reward, or the first one; nan where it is not scored. Solved
    is at least 1."""
    rewards = row.get("rewards") or {"": row.get("reward")}
    name = row.get("judged_by") or run.setting("evaluation.reward")
    value = rewards[name] if name in rewards else next(iter(rewards.values()))
    return float("nan") if value is None else float(value)


def side_by_side(run: RunRecord) -> str:
    """The section of the page: the same prompts at the first and the last evaluation, newly solved ones first."""
    first, last = ends(run)
    title = "<section><h2>The same tasks, before and after</h2>"
    if not first:
        why = "This run kept no two sets of held-out completions (rollouts/eval_*.jsonl)."
        return f'{title}<p class="note">{why}</p></section>'
    kinds = {prompt: kind(first[prompt], last[prompt]) for prompt in first}
    intro = (
        f"<p>{len(first):,} held-out tasks were answered at the first and at the last evaluation. Below are the first "
        f"{PROMPTS_A_KIND} of each kind by row number, not by looks; the counts are of all. How far the two "
        "completions are the same, they are dimmed.</p>"
    )
    steps = [a.row.get("step") for a in (next(iter(first.values())), next(iter(last.values())))]
    return f"{title}{intro}{filtered(kinds, KINDS, [first, last], [f'step {step}' for step in steps])}</section>"


def filtered(
    kinds: Mapping[int, str],
    labels: Mapping[str, str],
    sets: Sequence[Mapping[int, Attempts]],
    titles: Sequence[str],
) -> str:
    """Prompts with what each of ``sets`` answered side by side, a few of each kind in the order of ``labels``, and
    buttons that show one kind alone. ``titles`` are the sets'."""
    shown = [p for kind in labels for p in [q for q in kinds if kinds[q] == kind][:PROMPTS_A_KIND]]
    counts = {kind: list(kinds.values()).count(kind) for kind in labels}
    # The rules of page.css hide by number, so that one sheet does for every page.
    buttons = "".join(
        f'<input type="radio" name="kind" id="kind-{i}"{"" if i else " checked"}>'
        f'<label for="kind-{i}" class="{name}">{e(label)} <b>{n:,}</b></label>'
        for i, (name, label, n) in enumerate([("all", "all", len(kinds)), *((k, labels[k], counts[k]) for k in labels)])
    )
    numbers = {kind: i for i, kind in enumerate(labels, start=1)}
    articles = "".join(
        _prompt(f"{kinds[p]} k{numbers[kinds[p]]}", labels[kinds[p]], [found[p] for found in sets], titles)
        for p in shown
    )
    return f'<div class="prompts" style="--columns: {len(sets)}">{buttons}{articles}</div>'


def kind(first: Attempts, last: Attempts) -> str:
    before, after = first.share >= 0.5, last.share >= 0.5
    return {(False, True): "gained", (True, False): "lost", (True, True): "kept", (False, False): "unsolved"}[
        before, after
    ]


def _prompt(classes: str, label: str, found: Sequence[Attempts], titles: Sequence[str]) -> str:
    row = found[0].row
    columns = "".join(
        f"<span>{e(name)} <b>{e(short(value))}</b></span>" for name, value in (row.get("columns") or {}).items()
    )
    same = 0 if "turns" in row else common_prefix([cut(str(one.row.get("completion", ""))) for one in found])
    cells = "".join(_cell(title, one, same) for title, one in zip(titles, found, strict=True))
    return (
        f'<article class="{classes}"><header><span class="kind">{e(label)}</span>'
        f'<span class="id">#{e(row.get("prompt_id", ""))}</span>{columns}</header>'
        f'<pre class="prompt">{e(row.get("prompt", ""))}</pre><div class="cells">{cells}</div></article>'
    )


def _cell(title: str, attempt: Attempts, same: int) -> str:
    row = attempt.row
    reward = row.get("reward")
    if attempt.samples > 1:
        verdict = f"{attempt.solved} of {attempt.samples} solved"
    else:
        verdict = "unscored" if reward is None else "solved" if attempt.solved else "not solved"
    colour = "bad" if reward is not None else "unknown"
    colour = "good" if attempt.share >= 0.5 else colour
    notes = [f"{row.get('num_tokens', '?')} tokens"]
    notes += [] if reward is None else [f"reward {reward:g}"]
    notes += ["cut off"] if row.get("status") == "length" else []
    notes += notes_of(row)
    return (
        f'<div class="cell {colour}"><h4>{e(title)} <span class="verdict">{verdict}</span></h4>'
        f'<p class="note">{e(" · ".join(notes))}</p>{said(row, same)}</div>'
    )
