"""Suites end to end: what is asked, what is counted, and that a result's file says what its samples do."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from typer.testing import CliRunner

from grpo.cli.main import app
from grpo.config import Recipe
from grpo.config.load import load_recipe
from grpo.errors import UserError
from grpo.evaluation.statistics import clustered_interval
from grpo.evaluation.suites import evaluate_suite, prepare, scorers
from grpo.model.loading import load_configs, load_tokenizer
from grpo.randomness import key
from grpo.types import Completion, Status
from tests.conftest import make_recipe
from tests.small_runs import small_run

OWN = """\
title: Sums
about: three sums
rows: {path: ROWS, count: 3}
question: "try {prompt} ="
bare: {question: "answer {prompt} =", stop: ["so"]}
reward: {name: math}
sampling: {num_generations: 4, temperature: 0.7, top_p: 0.9, max_completion_length: 24}
source: of this test
"""
ROWS = [{"prompt": "1 + 1", "answer": "2"}, {"prompt": "2 + 2", "answer": "4"}, {"prompt": "3 + 3", "answer": "6"}]
# By row: the answers of four samples; None ended in no answer.
SAID = [["2", "3", "3.0", "2"], ["5", "\\frac{10}{2}", "4", None], [None, "7", "8", "9"]]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "sums.yaml").write_text(OWN.replace("ROWS", str(tmp_path / "rows.jsonl")))
    return tmp_path / "sums.yaml"


def with_suites(model: Path, *suites: Any, **sections: Any) -> Recipe:
    evaluation = {"suites": [str(suite) for suite in suites]} | sections.pop("evaluation", {})
    return make_recipe(model, evaluation=evaluation, **sections)


def prepared(recipe: Recipe, longest: int = 512, **more: Any) -> list[Any]:
    return prepare(recipe, load_tokenizer(recipe.model), load_configs(recipe.model), longest, **more)


class Says:
    """A backend whose completions are ``SAID``; it keeps what it was asked."""

    def generate(
        self, requests: list[Any], sampling: Any, version: int, on_group: Any = None
    ) -> list[list[Completion]]:
        self.sampling, self.keys = sampling, [k for request in requests for k in request.keys]
        return [
            [
                Completion(
                    [5], [0.0], Status.STOP if said else Status.LENGTH, f"\\boxed{{{said}}}" if said else "so", []
                )
                for said, _ in zip(SAID[request.prompt.id], request.keys, strict=True)
            ]
            for request in requests
        ]


def test_figures_are_those_of_plain_loops(tiny_model: Path, own: Path) -> None:
    (suite,) = prepared(with_suites(tiny_model, own))
    backend: Any = Says()
    with scorers([suite]) as (scorer,):
        metrics, rows, facts = evaluate_suite(suite, backend, scorer, Accelerator(cpu=True), version=0)
    solved = [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert [[row["rewards"]["math"] for row in rows if row["prompt_id"] == p] for p in range(3)] == solved
    assert metrics["eval/accuracy"] == facts["avg@4"]["value"] == 3 / 12
    pass_at_2 = sum(sum(any(pair) for pair in combinations(row, 2)) / 6 for row in solved) / 3
    assert facts["pass@k"]["2"]["value"] == pytest.approx(pass_at_2)
    assert facts["pass@k"]["4"]["value"] == pytest.approx(2 / 3)
    # 3 is 3.0 and 5 is 10/2. All four: a tie of 2 and 3, a loss of 4 to 5, three wrong ones.
    assert facts["maj@k"]["4"]["value"] == metrics["eval/maj@4"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    votes = [["r", "a", "a", "r"], ["a", "a", "r", None]]
    maj_at_2 = sum(sum(_wins(pair) for pair in combinations(row, 2)) / 6 for row in votes) / 3
    assert facts["maj@k"]["2"]["value"] == pytest.approx(maj_at_2)
    low, high = clustered_interval(_array(solved), ["try 1 + 1 =", "try 2 + 2 =", "try 3 + 3 ="])
    assert (facts["avg@4"]["low"], facts["avg@4"]["high"]) == (low, high)
    assert facts["verdicts"] == {"correct": 3, "truncated": 2, "wrong": 7}
    assert (backend.sampling.temperature, backend.sampling.top_p) == (0.7, 0.9)
    assert backend.keys == [key(0, "evaluation", "sums", p, g) for p in range(3) for g in range(4)], "to be repeated"


def _wins(votes: tuple[str | None, ...]) -> float:
    counts = Counter(vote for vote in votes if vote)
    first = [vote for vote in counts if counts[vote] == max(counts.values())]
    return ("r" in first) / len(first) if first else 0.0


def _array(solved: list[list[int]]) -> Any:
    import numpy as np

    return np.array(solved, dtype=float)


def test_the_template_decides_what_is_asked(tiny_model: Path, own: Path) -> None:
    (bare,) = prepared(with_suites(tiny_model, own, rollout={"stop": ["</answer>"]}))
    assert bare.prompts[0].text == "answer 1 + 1 ="
    assert bare.recipe.rollout.stop == ["so", "</answer>"], "the suite's, and what the model was trained to end on"
    (r1,) = prepared(with_suites(tiny_model, own, data={"template": "r1_zero"}))
    assert r1.prompts[0].text.endswith("User: try 1 + 1 = Assistant:")
    assert r1.recipe.rollout.stop == []
    assert (r1.facts["prompt"]["template"], bare.facts["prompt"]["question"]) == ("r1_zero", "answer {prompt} =")


def test_sampling_can_be_changed_and_is_cut_to_what_the_model_has(tiny_model: Path, own: Path, caplog: Any) -> None:
    (suite,) = prepared(with_suites(tiny_model, own, evaluation={"suite_sampling": {"temperature": 0.0, "rows": 2}}))
    assert (suite.recipe.evaluation.num_generations, len(suite.prompts)) == (1, 2)
    assert "suite sums: the first 2 of 3 rows" in caplog.text
    (suite,) = prepared(
        with_suites(tiny_model, own, evaluation={"suite_sampling": {"max_completion_length": 600}}), 100
    )
    assert suite.recipe.longest_sequence() == 100
    assert suite.facts["max_completion_length_wanted"] == 600
    assert "completions have at most 95 tokens, not 600" in caplog.text
    with pytest.raises(
        UserError, match="its longest prompt has 5 tokens, and prompt and completion may have 5 together"
    ):
        prepared(with_suites(tiny_model, own), 5)
    greedy = OWN.replace("num_generations: 4, temperature: 0.7", "num_generations: 1, temperature: 0.0")
    own.write_text(greedy.replace("ROWS", str(own.parent / "rows.jsonl")))
    recipe = with_suites(tiny_model, own, evaluation={"suite_sampling": {"num_generations": 4}})
    with pytest.raises(UserError, match=r"sampled greedily, so its 4 completions .*suite_sampling.temperature too"):
        prepared(recipe)


def test_rows_of_a_file_take_the_place_of_the_hub(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"question": "1 + 1", "answer": "It is\n#### 2"}) + "\n")
    (suite,) = prepared(with_suites(tiny_model, "gsm8k"), rows=str(tmp_path / "mine.jsonl"))
    assert suite.prompts[0].columns == {"answer": "2"}
    assert (suite.facts["rows"]["revision"], suite.facts["rows"]["count"]) == (None, 1)
    assert "1 rows of" in suite.facts["rows"]["note"]
    with pytest.raises(UserError, match="--rows is the file of one suite"):
        prepared(with_suites(tiny_model, "gsm8k", "math500"), rows="x")
    with pytest.raises(UserError, match=r"suite gsm8k: can't load split 'test' of openai/gsm8k.*--rows NAME.jsonl"):
        prepared(with_suites(tiny_model, "gsm8k"))


@pytest.mark.slow
def test_a_model_alone_is_evaluated_and_its_file_says_what_its_samples_do(tiny_model: Path, own: Path) -> None:
    folder = own.parent / "eval"
    command = ["eval", str(tiny_model), "--suite", str(own), "--output", str(folder), "model.dtype=float32"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (file,) = folder.glob("*.json")
    assert file.name == f"{tiny_model.name}-sums.json"
    facts = json.loads(file.read_text())
    samples = [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
    assert len(samples) == facts["counts"]["completions"] == 12
    assert facts["accuracy"] == sum(row["rewards"]["math"] for row in samples) / 12
    assert facts["prompt"]["first"] == samples[0]["prompt"] == "answer 1 + 1 ="
    assert (facts["prompt"]["template"], facts["sampling"]["top_p"], facts["sampling"]["seed"]) == ("none", 0.9, 0)
    assert any("model.safetensors" in name for name in facts["inputs"])
    assert facts["rows"]["sha256"]
    assert {"torch", "transformers"} <= facts["environment"]["packages"].keys()


@pytest.mark.slow
def test_a_run_evaluates_its_suites_at_both_ends(tiny_model: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own.parent / "run"
    sections = {"evaluation": {"suites": [str(own)]}, "data": {"eval_size": 4}}
    small_run(tiny_model, folder, monkeypatch, steps=2, **sections)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if "eval/sums/accuracy" in row]
    assert [row["step"] for row in told] == [0, 2]
    assert all("eval/accuracy" in row for row in told), "in one line with the held-out rows"
    assert sorted(file.name for file in (folder / "eval").glob("*.json")) == [
        "step_000000-sums.json",
        "step_000002-sums.json",
    ]
    assert load_recipe(folder / "recipe.yaml").evaluation.suites == [str(own)]
