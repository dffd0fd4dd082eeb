"""The report shows what the run folder says, escapes everything, needs no network, and says what is missing."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import sys
from pathlib import Path
from time import perf_counter

import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from grpo.errors import UserError
from grpo.report.attempts import KINDS, PROMPTS_A_KIND, side_by_side
from grpo.report.curves import BARS, draw, panels, summary
from grpo.report.drawing import LIGHT, apart, dress, finish
from grpo.report.judgement import gain, judgement
from grpo.report.markup import common_prefix, completion, marked
from grpo.report.write import ending, write_report, write_report_at_end
from grpo.run.read import headline, read_run
from tests.report.made_runs import Page, make_run, write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo")
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(run) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_headline_is_first_against_last_evaluation(run, page):
    facts = headline(read_run(run))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert facts["accuracy_before"] == pytest.approx(0.16)
    assert facts["length_after"] == rows[-1]["eval/completions/mean_length"]
    assert facts["seconds"] == pytest.approx(sum(row.get("step_time", 0.0) for row in rows))
    assert facts["tokens"] == 100 * 512 * facts["length_after"]
    shown = page.all("value")
    assert page.all("big") == [f"0.160 → {facts['accuracy_after']:.3f}"]
    assert f"46 → {facts['length_after']:.0f}" in shown


@pytest.mark.slow
def test_the_picture_is_a_png_of_a_readable_size(run):
    picture = (run / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 1500
    assert height >= 900


@pytest.mark.slow
def test_the_page_stands_alone_and_runs_nothing(run, page):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in page.tags)
    references = [a[name] for _, a in page.tags for name in ("src", "href", "xlink:href", "srcset") if name in a]
    references += re.findall(r"url\(([^)]*)", text)
    assert references
    assert all(target.startswith("#") for target in references)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "#fe0" not in text, "a colour that was not themed"


@pytest.mark.slow
def test_every_panel_is_there_and_accuracy_leads(page):
    titles = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert titles == [
        "Held-out accuracy",
        "Reward",
        "Completion length",
        "Entropy",
        "Verdicts",
        "Without signal, cut off",
        "Distance",
        "Gradient norm",
        "Seconds per step",
    ]


@pytest.mark.slow
def test_completions_are_escaped_whatever_they_hold(run, page):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text
    assert "grpo train recipes/&lt;demo&gt;.yaml" in text
    assert "\x00" not in text
    assert "\x1b" not in text
    assert "\u2400" in text
    assert "<mark><i>&lt;answer&gt;</i>6 * 3<i>&lt;/answer&gt;</i></mark>" in text


@pytest.mark.slow
def test_the_same_prompts_stand_side_by_side_with_their_verdicts(page):
    articles = [attributes["class"].split()[0] for tag, attributes in page.tags if tag == "article"]
    assert list(dict.fromkeys(articles)) == ["gained", "unsolved", "kept"], "newly solved first"
    assert max(articles.count(kind) for kind in set(articles)) == PROMPTS_A_KIND
    assert page.count("cell") == 2 * len(articles)
    steps = [text.strip() for text in page.all("h4")]
    assert steps[:2] == ["step 0", "step 100"]
    # solved in the first and last column exactly as the kind says
    cells = [
        attributes["class"].split()[1] for _, attributes in page.tags if "cell " in (attributes.get("class") or "")
    ]
    for i, kind in enumerate(articles):
        ends = cells[2 * i], cells[2 * i + 1]
        assert ends == {"gained": ("bad", "good"), "kept": ("good", "good"), "unsolved": ("bad", "bad")}[kind]


@pytest.mark.slow
def test_counts_are_of_all_prompts_not_of_those_shown(page):
    labels = "".join(text for name, text in page.texts if name in ("all", "b", *KINDS))
    first = sum((p * 0.618) % 1 < 0.16 for p in range(60))
    assert "all 60" in labels
    assert f"solved before and after {first}" in labels


def test_an_sft_run_has_its_loss(tmp_path):
    rows = [{"step": s, "loss": 3 / s, "learning_rate": 1e-3, "grad_norm": 1.0, "step_time": 0.5} for s in range(1, 50)]
    rows += [{"step": s, "eval/loss": 3.2 - s / 25} for s in (0, 25, 49)]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    page = Page(write_report(tmp_path).read_text())
    titles = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert titles == ["Loss", "Gradient norm", "Learning rate"]
    assert page.all("big") == ["3.200 → 1.240"]


@pytest.mark.slow
def test_the_gain_leads_with_its_interval_and_the_judgement_in_words(run, page):
    found = gain(read_run(run))
    assert found.tone == "good"
    assert found.low < found.difference < found.high
    assert found.how == "the same tasks, paired"
    assert f"{found.difference:+.3f}" in page.all("b")
    good = "".join(page.all("good"))
    assert f"Held-out accuracy rose from 0.160 to {found.after:.3f}" in good
    assert "no rule saw anything wrong" in good
    assert not page.all("bad")


@pytest.mark.slow
def test_only_what_the_recipe_says_beside_the_defaults_is_listed(run, page):
    names = page.all("th")
    assert "rollout.max_completion_length" in names
    assert "rewards.0.name" in names
    assert "training.seed" not in names  # which the recipe gives, and which is the default
    assert "training: {output_dir: runs/demo" in (run / "report.html").read_text()  # the whole, to fold out


def test_an_axis_ends_at_a_mark_and_a_curve_of_zeros_lies_at_its_foot():
    for values, expected in (
        ([0.0, 34.5], (0, 40)),
        ([0.0, 0.208], (0, 0.25)),
        ([0.0, 0.0], (0, 1)),
        ([-4.0, 3.2], None),
    ):
        ax = Figure().add_subplot()
        dress(ax, LIGHT)
        ax.plot([0, 5], values)
        finish(ax, LIGHT, 5, [])
        low, high = ax.get_ylim()
        if expected:
            assert (low, high) == pytest.approx(expected)
        assert low <= min(values)
        assert high >= max(values)


@pytest.mark.slow
def test_a_collapsed_run_is_told_in_red(tmp_path):
    make_run(tmp_path / "run", steps=20, every=10, tasks=40, collapsed=True)
    page = Page(write_report(tmp_path / "run").read_text())
    bad = "".join(page.all("bad"))
    assert "Held-out accuracy fell from 0.900 to 0.000" in bad
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<b>no_signal</b> from step 13 to the end: 100% of groups had no signal" in text
    assert "<b>accuracy_below_start</b> from step 10 to the end" in text
    articles = [attributes["class"].split()[0] for tag, attributes in page.tags if tag == "article"]
    assert articles[0] == "lost"
    assert gain(read_run(tmp_path / "run")).tone == "bad"


def test_what_two_completions_begin_with_in_common_is_dimmed():
    for texts, same in [
        (["try 3 + 4 no", "try 3 + 5 yes"], "try 3 + "),
        (["the same", "the same"], "the same"),
        (["thesis", "thermal"], ""),
        (["a <answer>6 * 3</answer>", "a <answer>6 * 4</answer>"], "a "),
        (["a <answer>6</answer> b", "a <answer>6</answer> c"], "a <answer>6</answer> "),
        (["", "x"], ""),
    ]:
        assert texts[0][: common_prefix(texts)] == same
    text = completion("a <answer>1</answer> b", 21)
    assert text.startswith('<span class="same">a <mark>')
    assert text.endswith("</mark> </span>b")


def test_labels_are_kept_apart_and_within_the_axes():
    assert apart([0.1, 0.11, 0.5], 0.1) == pytest.approx([0.1, 0.2, 0.5])
    assert apart([0.97, 0.98, 0.99], 0.1) == pytest.approx([0.8, 0.9, 1.0])


@pytest.mark.slow
def test_axes_begin_at_0_and_reach_over_the_whole_run_in_every_panel(run):
    record = read_run(run)
    for panel in panels(record):
        ax = Figure().add_subplot()
        labels = panel.draw(ax, record, LIGHT)
        finish(ax, LIGHT, record.steps, labels)
        assert ax.get_xlim() == (0, 100)
        assert ax.get_ylim()[0] == 0
        assert ax.get_legend() is None


def test_the_end_says_where_everything_is_and_what_comes_next(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "my run", steps=2, every=1, tasks=2)
    (folder / "final").mkdir()
    monkeypatch.chdir(tmp_path)
    (folder / "report.html").touch()
    said = list(ending(Path("my run")))
    assert said[0] == "done: my run"
    assert said[1].startswith("  result  2 steps, held-out accuracy 0.160 -> 0.4")
    assert said[2:] == [
        "  report  my run/report.html",
        "  model   my run/final",
        "  next    grpo eval 'my run'",
        "          grpo chat 'my run'",
    ]


def test_a_run_that_is_still_going_can_be_looked_at(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "kl": null}\n{"step": 2, "rew')
    page = Page(write_report(tmp_path).read_text())
    assert "0.500 → 0.500" in page.all("value")


def test_a_folder_that_holds_no_run_gets_no_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty: the run has not finished its first step"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_cannot_be_drawn_still_ends_well(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("grpo.report.curves", "grpo.report.drawing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="needs matplotlib"):
        write_report(run)
    write_report_at_end(run)
    assert "no report: the report needs matplotlib" in caplog.text
    assert not (run / "report.html").exists()


def test_what_turns_text_round_is_shown_as_its_escape(tmp_path):
    """Elsewhere than on a terminal too: the page, and the title of the picture."""
    run = read_run(make_run(tmp_path / "a\x1b[31m\u202eb", steps=2, every=1, tasks=2))
    assert summary(run, headline(run)).startswith("a\\x1b[31m\\u202eb: held-out accuracy")
    written = completion("\u202eab\x9b\u2066 <answer>\x7f</answer>")
    assert written.startswith("\\u202eab\\x9b\\u2066 <mark>")
    assert "\x7f" not in written


def test_a_folder_that_takes_no_report_is_named(tmp_path, caplog):
    run = make_run(tmp_path / "run", steps=4, every=2, tasks=2)
    (run / "report.html" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run/report.html: cannot be written: Is a directory"):
        write_report(run)
    write_report_at_end(run)
    assert "no report: " in caplog.text


def test_dollars_in_a_runs_name_are_no_formula(tmp_path):
    folder = make_run(tmp_path / "costs_$5_and_$\\frac{", steps=4, every=2, tasks=2)
    rows = (folder / "metrics.jsonl").read_text().replace("rewards/format/mean", "rewards/$a_{$/mean")
    (folder / "metrics.jsonl").write_text(rows.replace("verdicts/countdown/wrong", "verdicts/countdown/$x^$"))
    write_report(folder)
    assert "costs_$5_and_$" in (folder / "report.html").read_text()


def test_a_completion_of_tags_is_marked_in_one_pass():
    start = perf_counter()
    assert completion("<answer>" * 100_000).count("<mark>") == 0
    text = completion("<answer>1</answer> <answer><answer>2</answer></answer><answer>")
    assert text.count("<mark>") == text.count("</mark>") == 2
    assert re.sub("<[^>]*>", "", text) == html.escape("<answer>1</answer> <answer><answer>2</answer></answer><answer>")
    assert marked("&lt;answer&gt;" * 200_000).startswith("&lt;answer&gt;")
    assert perf_counter() - start < 2  # not in the square of them


ODD = {
    "metrics.jsonl": [
        ('{"step": 1, "reward": "high"}', r"metrics.jsonl:1: reward is 'high', and not a number"),
        ('{"step": 1, "eval/accuracy": [1]}', r"metrics.jsonl:1: eval/accuracy is \[1\], and not a number"),
        ('{"step": true, "reward": 1}', r"metrics.jsonl:1: not a row of a run"),
        ('{"step": 1, "reward": 1' + 400 * "0" + "}", "metrics.jsonl:1: reward is 1000"),
        ("[" * 100_000 + "\n{}", "metrics.jsonl:1: not a line of JSON"),
        ("\xff\xfe\n{}\n", "metrics.jsonl:1: not a"),
    ],
    "recipe.yaml": [
        ("model: [", "recipe.yaml: not readable as YAML"),
        ("- a\n- b\n", r"recipe.yaml: expected keys with values, got \['a', 'b'\]"),
    ],
    "environment.json": [
        ("{", "environment.json: not readable as JSON"),
        ("[1]", r"environment.json: expected keys with values, got \[1\]"),
    ],
    "rollouts/eval_000000.jsonl": [
        ('{"step": 0, "prompt_id": []}', r"eval_000000.jsonl:1: prompt_id is \[\], which no run writes"),
        ('{"step": 0, "reward": "x"}', r"eval_000000.jsonl:1: reward is 'x', which no run writes"),
        ('{"step": 0, "rewards": {"a": "b"}}', r"eval_000000.jsonl:1: rewards is \{'a': 'b'\}, which"),
        ('{"step": 0, "columns": 3}', "eval_000000.jsonl:1: columns is 3, which no run writes"),
    ],
}


@pytest.mark.parametrize(("name", "content", "said"), [(name, *case) for name, cases in ODD.items() for case in cases])
def test_a_file_that_no_run_writes_is_named(small, name, content, said):
    file = small / name
    before = file.read_bytes()
    try:
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=said):
            side_by_side(read_run(small))
    finally:
        file.write_bytes(before)


def test_settings_and_facts_of_odd_types_are_left_out(small):
    (small / "recipe.yaml").write_text("tracking: {run_name: 7}\ntraining: {max_steps: many, seed: []}\nrollout: [1]\n")
    (small / "environment.json").write_text('{"cpu": 1, "gpus": [2], "packages": [3], "source": "x"}')
    (small / "rollouts/eval_last.jsonl").write_text("no row")
    write_report(small)
    assert "<h1>7</h1>" in (small / "report.html").read_text()
    for name in ("metrics.jsonl", "rollouts/eval_000000.jsonl"):
        (small / name).unlink()
        (small / name).mkdir()
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            write_report(small)
        shutil.rmtree(small / name)
        write_jsonl(small / name, [{"step": 0, "loss": 1.0}])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("small") / "run", steps=2, every=1, tasks=2)


def test_what_a_recipe_expects_is_drawn_and_never_outside_of_the_axes(tmp_path):
    run = make_run(tmp_path / "run", steps=4, every=2, tasks=2)
    bands = [
        {"metric": "eval/accuracy", "step": 4, "low": 0.6, "high": 0.8, "source": "three seeds"},
        {"metric": "completions/mean_length", "step": 2, "low": 50, "high": 70, "source": "three seeds"},
        {"metric": "reward", "step": 9, "low": 0, "high": 1, "source": "not there yet"},
    ]
    with (run / "recipe.yaml").open("a") as recipe:
        recipe.write(f"expect: {json.dumps(bands)}\n")
    record = read_run(run)
    drawn = {}
    for panel in panels(record):
        ax = Figure().add_subplot()
        finish(ax, LIGHT, record.steps, draw(panel, ax, record, LIGHT))
        bars = [c.get_segments()[0].tolist() for c in ax.collections if isinstance(c, LineCollection)]
        if bars:
            drawn[panel.title] = bars
            assert max(top for (_, _), (_, top) in bars) <= ax.get_ylim()[1]
            assert panel.caption.endswith(BARS)
    assert drawn == {"Held-out accuracy": [[[4, 0.6], [4, 0.8]]], "Completion length": [[[2, 50], [2, 70]]]}


def test_what_a_recipe_expects_is_judged_in_words(tmp_path):
    run = make_run(tmp_path / "run", steps=4, every=2, tasks=2)
    recipe = (run / "recipe.yaml").read_text()
    band = "{{metric: eval/accuracy, step: 4, low: {}, high: {}, source: three seeds}}"
    for low, high, tone in ((0.3, 0.6, "good"), (0.8, 0.9, "bad")):
        (run / "recipe.yaml").write_text(f"{recipe}\nexpect: [{band.format(low, high)}, {{metric: broken}}]\n")
        (found,) = [finding for finding in judgement(read_run(run)) if finding.name.endswith(" track")]
        assert (found.tone, found.name) == (tone, "on track" if tone == "good" else "off track")
        assert found.text.startswith("at step 4: eval/accuracy 0.4")
