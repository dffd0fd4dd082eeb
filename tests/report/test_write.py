"""The report shows what the run folder says, escapes everything, needs no network, and says what is missing."""

from __future__ import annotations

import html
import json
import math
import random
import re
import shutil
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path
from time import perf_counter

import pytest

from grpo.errors import UserError
from grpo.report.curves import summary
from grpo.report.page import COLUMNS, PROMPTS_A_KIND, _completion, _marked, _side_by_side
from grpo.report.write import write_report, write_report_at_end
from grpo.run.read import headline, read_run

VOID = {"meta", "input", "br", "img", "link", "hr"}
HOSTILE = '<script>alert("x")</script><think>6 * 3 = 18</think> <answer>6 * 3</answer> & \x00 \x1b[31m</pre>'


def make_run(folder: Path, *, steps: int = 100, every: int = 25, tasks: int = 60) -> Path:
    """A run as the trainer leaves it: accuracy and length rise, entropy falls."""
    draw = random.Random(0)
    (folder / "rollouts").mkdir(parents=True)
    lines = []
    for step in range(steps + 1):
        done = 1 - math.exp(-step / (0.3 * steps))
        accuracy, length = 0.16 + 0.3 * done, 46 + 55 * done
        if step:
            rollout = 1.6 + length / 60 + draw.gauss(0, 0.1)
            counts = [512 * (accuracy + draw.gauss(0, 0.01)), 512 * (0.6 - 0.3 * done), 40 * (1 - done), 12.0]
            lines.append(
                {
                    "step": step,
                    "loss": draw.gauss(0, 1e-3),
                    "reward": accuracy + 0.1 * done + draw.gauss(0, 0.03),
                    "reward_std": 0.4,
                    "frac_reward_zero_std": max(0.0, 0.5 - 0.2 * done + draw.gauss(0, 0.05)),
                    "frac_unscored": 0.0,
                    "rewards/countdown/mean": accuracy + draw.gauss(0, 0.02),
                    "rewards/format/mean": 0.7 + 0.3 * done + draw.gauss(0, 0.02),
                    "completions/mean_length": length + draw.gauss(0, 3),
                    "completions/clipped_ratio": max(0.0, 0.02 + draw.gauss(0, 0.01)),
                    "entropy": 1.1 - 0.6 * done + draw.gauss(0, 0.02),
                    "grad_norm": abs(0.4 + draw.gauss(0, 0.1)),
                    "kl": 0.02 * done,
                    "clip_ratio/region_mean": 0.004,
                    "learning_rate": 1e-4,
                    "num_tokens": step * 512.0 * length,
                    "tokens_per_second": 9000 + draw.gauss(0, 300),
                    "step_time": rollout + 2.7,
                    "time/rollout": rollout,
                    "time/score": 0.2,
                    "time/train": 2.4,
                    "time/sync": 0.1,
                    **{f"verdicts/countdown/{v}": n for v, n in zip(VERDICTS, counts, strict=True)},
                }
            )
        if step % every == 0:
            half = 0.04
            lines.append(
                {
                    "step": step,
                    "eval/accuracy": accuracy,
                    "eval/accuracy_low": accuracy - half,
                    "eval/accuracy_high": accuracy + half,
                    "eval/pass@4": accuracy + 0.15,
                    "eval/completions/mean_length": length,
                    "eval/completions/clipped_ratio": 0.02,
                }
            )
            rows = [eval_row(step, prompt, accuracy, length) for prompt in range(tasks)]
            write_jsonl(folder / "rollouts" / f"eval_{step:06d}.jsonl", rows)
    write_jsonl(folder / "metrics.jsonl", lines)
    (folder / "recipe.yaml").write_text(
        "stage: grpo\nmodel: {name: data/tiny_base}\ndata: {name: countdown}\nrewards: [{name: countdown}]\n"
        "rollout: {max_completion_length: 128}\n"
        f"training: {{output_dir: runs/demo, max_steps: {steps}, seed: 0}}\n"
    )
    environment = {
        "started": "2026-01-01T12:00:00+0000",
        "command": "grpo train recipes/<demo>.yaml",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "transformers": "5.19.0"},
        "source": {"commit": "0123456789abcdef", "modified": True},
        "cpu": {"model": "A Processor", "cores": 2, "memory_gb": 8.0},
        "gpus": [],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


VERDICTS = ("correct", "wrong", "no_answer", "truncated")


def eval_row(step: int, prompt: int, accuracy: float, length: float) -> dict:
    solved = (prompt * 0.618) % 1 < accuracy
    tries = [f"{3 + prompt % 5} + {i % 9} = {3 + prompt % 5 + i % 9} ; no" for i in range(int(length / 8))]
    text = f"<think>{' , '.join(tries)}</think> <answer>{'6 * 3' if solved else '6 + 3'}</answer>"
    return {
        "step": step,
        "prompt_id": 1000 + prompt,
        "sample": 0,
        "prompt": f"numbers 6 3 {prompt % 9 + 1} target 18\nA: <think>",
        "completion": HOSTILE if prompt == 0 else text,
        "status": "stop",
        "num_tokens": int(length),
        "reward": float(solved),
        "rewards": {"countdown": float(solved)},
        "columns": {"nums": [6, 3, prompt % 9 + 1], "target": 18},
    }


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Reads a page strictly: tags must nest. Keeps tags with their attributes, and text by the innermost class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.texts.append((self.open[-1][1] or self.open[-1][0], data))

    def all(self, kind: str) -> list[str]:
        return [text for name, text in self.texts if name == kind]

    def count(self, kind: str) -> int:
        return sum(kind in (attributes.get("class") or "").split() for _, attributes in self.tags)


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
    assert f"0.160 → {facts['accuracy_after']:.3f}" in shown
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
def test_every_panel_is_there(page):
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
    articles = [attributes["class"] for tag, attributes in page.tags if tag == "article"]
    assert set(articles) == {"gained", "kept", "unsolved"}
    assert max(articles.count(kind) for kind in set(articles)) == PROMPTS_A_KIND
    assert page.count("cell") == COLUMNS * len(articles)
    steps = [text.strip() for text in page.all("h4")]
    assert steps[:COLUMNS] == ["step 0", "step 25", "step 75", "step 100"]
    # solved in the first and last column exactly as the kind says
    cells = [
        attributes["class"].split()[1] for _, attributes in page.tags if "cell " in (attributes.get("class") or "")
    ]
    for i, kind in enumerate(articles):
        ends = cells[i * COLUMNS], cells[i * COLUMNS + COLUMNS - 1]
        assert ends == {"gained": ("bad", "good"), "kept": ("good", "good"), "unsolved": ("bad", "bad")}[kind]


@pytest.mark.slow
def test_counts_are_of_all_prompts_not_of_those_shown(page):
    labels = "".join(text for name, text in page.texts if name in ("label", "b"))
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
    assert "3.200 → 1.240" in page.all("value")


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
    written = _completion("\u202eab\x9b\u2066 <answer>\x7f</answer>")
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
    assert _completion("<answer>" * 100_000).count("<mark>") == 0
    text = _completion("<answer>1</answer> <answer><answer>2</answer></answer><answer>")
    assert text.count("<mark>") == text.count("</mark>") == 2
    assert re.sub("<[^>]*>", "", text) == html.escape("<answer>1</answer> <answer><answer>2</answer></answer><answer>")
    assert _marked("&lt;answer&gt;" * 200_000).startswith("&lt;answer&gt;")
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
            _side_by_side(read_run(small))
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
