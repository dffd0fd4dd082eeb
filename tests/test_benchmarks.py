"""The benchmarks run, on the tiny model, and what they report can be wrong: each check is shown a wrong case."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import algorithms, r1, staleness, turns
from benchmarks.common import timed
from benchmarks.gpu import report, suite
from benchmarks.gpu import shapes as gpu_shapes
from benchmarks.gpu import update as gpu_update
from benchmarks.rollout import make_backend, make_requests
from benchmarks.rollout_agreement import agreement
from benchmarks.trl import case as trl_case
from benchmarks.trl.gradient import relative_difference
from grpo.backends.base import Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.backends.hf.draw import sample
from grpo.config.load import load_recipe
from grpo.run.read import RunRecord

ROOT = Path(__file__).parents[1]


def last_line(*command: str, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_lengths_of_a_step_have_the_mean_and_the_longest_that_are_asked_for():
    case = trl_case.Case()
    for step in range(3):
        lengths = case.lengths(step)
        assert (sum(lengths), max(lengths), len(lengths)) == (32 * 85, 128, 32)
    assert case.lengths(0) != case.lengths(1)
    assert len({row["prompt"] for row in case.rows()}) == case.prompts * case.steps


def test_the_rewards_of_the_case():
    assert trl_case.alternating(["a"] * 4) == [0.0, 1.0, 0.0, 1.0]
    assert trl_case.names_the_target(["it is 12.", "it is 112"], [12, 12]) == [1.0, 0.0]


def test_a_gradient_that_is_off_shows():
    g = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    assert relative_difference(g, g) == 0.0
    assert relative_difference({**g, "b": torch.tensor([0.0, 1.0])}, g) == pytest.approx(0.2)


@pytest.mark.slow
def test_rollout_measures_every_way_that_runs_here():
    size = ["--prompts=2", "--completions=2", "--length=12", "--rounds=1", "--check=2", "--vllm-threads"]
    found = last_line("benchmarks.rollout", "--model=data/tiny_base", *size)
    for way in ("hf backend", "generate, dynamic cache", "generate, static cache", "generate_batch"):
        assert found["ways"][way]["tokens"] <= 2 * 2 * 12, found["ways"][way]
    assert found["agreement"]["logprob_difference"] < 1e-4
    assert 0 < found["share_of_sampling"] < 1


@pytest.fixture(scope="module")
def backend():
    return make_backend("data/tiny_base", "float32")[0]


def test_agreement_finds_a_backend_that_depends_on_its_batch(backend, monkeypatch):
    requests = make_requests(backend.tokenizer, 2, 2, 0)
    found = agreement(backend, requests, 12, 4)
    assert found["logprob_difference"] < 1e-4
    assert found["differing"] == 0 or found["largest_boundary_distance"] < 1e-4

    generate = HFBackend.generate

    def hotter_alone(self, requests, sampling, version, *rest):
        alone = len(requests) == 1
        return generate(self, requests, type(sampling)(12, temperature=1.5 if alone else 1.0), version, *rest)

    monkeypatch.setattr(HFBackend, "generate", hotter_alone)
    found = agreement(backend, requests, 12, 4)
    assert found["differing"] > 0
    assert found["largest_boundary_distance"] > 1e-3


def test_episodes_draw_as_many_tokens_as_one_turn(backend):
    requests = make_requests(backend.tokenizer, 2, 2, 1)
    lengths = turns.lengths_of(requests, 3, 4, 1)
    assert len({tuple(of_key) for of_key in lengths.values()}) == 4
    drawn = sum(map(sum, lengths.values()))
    assert turns.in_one_turn(backend)(requests, lengths) == drawn
    options = argparse.Namespace(tool=0.01, answer=3)
    assert turns.in_turns(backend, options, 2)(requests, lengths) == drawn
    tool = turns.SlowTool(requests, lengths, 0.01, 3, 2)
    assert len(tool.answer((0, 0), [], 0, "stop", last=False).result()) == 3


def test_timed_counts_what_the_engine_calls_and_puts_it_back(backend):
    ours = [module for name, module in sys.modules.items() if name.startswith("grpo.backends")]
    holders = [module for module in ours if getattr(module, "sample", None) is sample]
    with timed({"sample": sample}, "grpo.backends") as seconds:
        backend.generate(make_requests(backend.tokenizer, 1, 1, 0), Sampling(4), 0)
    assert seconds["sample"] > 0
    assert holders
    assert all(module.sample is sample for module in holders)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "none"])
def test_the_parts_of_a_profile_add_up_to_the_step(compiler):
    if compiler != "none" and shutil.which(compiler) is None:
        pytest.skip("no g++")
    recipe = "recipes/smoke_cpu.yaml"
    found = last_line("benchmarks.profile", recipe, "--steps=1", CXX=compiler)[recipe]
    parts = {name: row["share"] for name, row in found["parts"].items()}
    phases = [name for name in parts if not name.startswith(" ")]
    assert phases == ["rollout", "score", "train", "sync"]
    assert sum(parts[name] for name in phases) == pytest.approx(1.0)
    inner = sum(share for name, share in parts.items() if name.startswith(" "))
    assert inner == pytest.approx(parts["rollout"] + parts["train"])
    decoding = ["decode: attention", "decode: linear layers"] if compiler == "none" else ["decode: compiled step"]
    for part in ("prefill", *decoding, "sampling", "forward", "backward: model"):
        assert parts[f"  {part}"] > 0, part
    assert all(share > -0.01 for share in parts.values()), parts


def test_the_work_of_an_update_counted_by_hand():
    """One layer of one head, by the products that are made: 2 operations for each weight and token, 3 passes."""
    shape = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    gpu_shapes.SHAPES["by hand"] = {**shape, "num_key_value_heads": 1, "vocab_size": 10}
    weights, head = 4 * 4 * 4 + 3 * 4 * 8, 4 * 10
    assert gpu_shapes.counts("by hand") == {"layers": weights, "head": head}
    pairs = [3 + 2 + 1, (3 + 1) + (3 + 2), 3 + 1]  # in the prompt; of completions of 2 and 1 tokens
    flops = 2 * weights * (3 + 2 + 1) + 2 * head * 3 + 4 * 4 * sum(pairs)
    once, each = gpu_shapes.training_flops("by hand", [3], [[2, 1]])
    assert once == 3 * flops
    assert each == once + 3 * (2 * weights * 3 + 4 * 4 * pairs[0])


def test_the_limits_of_the_suites_parts_add_up_to_nine_minutes_and_its_commands_are_understood():
    parts = suite.all_parts(suite.SHAPES, "cuda", "models/smollm2-135m")
    assert sum(part.limit for part in parts) <= suite.SECONDS_IN_ALL == 9 * 60
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        module = import_module(f"benchmarks.gpu.{part.module}")
        with pytest.raises(SystemExit) as ended:
            module.main([*part.arguments, "--help"])
        assert ended.value.code == 0, part


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_is_reported_with_what_it_had_and_takes_nothing_along(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "LEAST_SECONDS", 0.1)
    code = "import os, sys, time; print('{\"a\": 1}', flush=True); print('why', file=sys.stderr, flush=True); "
    hangs = code + "child = os.fork(); child and print('{\"child\": %d}' % child, flush=True); time.sleep(60)"
    run = suite.Suite(tmp_path, 60)
    assert run.run(suite.Part("fails", 10, "x", launcher=["-c", code + "sys.exit(3)"])) == 3
    assert run.run(suite.Part("hangs", 1, "x", launcher=["-c", hangs])) == "took over 1 s"
    found = report.read(tmp_path)
    assert found["fails"] | {"seconds": 0} == {"a": 1, "error": "ended with 3", "status": 3, "seconds": 0, "limit": 10}
    assert (found["hangs"]["a"], found["hangs"]["error"]) == (1, "took over 1 s")
    until = time.monotonic() + 10
    while runs(found["hangs"]["child"]):
        assert time.monotonic() < until, "what the part started outlives it"
        time.sleep(0.02)
    assert (tmp_path / "logs.txt").read_text().count("why") == 2
    assert "hangs: took over 1 s" in report.table(found)


def test_a_suite_without_time_left_says_so_of_each_part(tmp_path):
    assert suite.Suite(tmp_path, 1).run(suite.Part("late", 10, "machine")) == "no time left"
    assert report.read(tmp_path) == {"late": {"error": "no time left"}}


@pytest.mark.slow
@pytest.mark.parametrize("module", ["rollout", "update"])
def test_a_part_of_the_suite_measures_a_tiny_model(module, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests' policies compute in float32
    import_module(f"benchmarks.gpu.{module}").main(["tiny", "--device=cpu", *suite.CPU_SIZES[module]])
    AcceleratorState._reset_state(reset_partial_state=True)
    found = {}
    for line in capsys.readouterr().out.splitlines():
        found |= json.loads(line)
    if module == "rollout":
        assert 0 < found["floor_ms"] < found["floor_with_cache_ms"]
        assert all(
            found[key] > 0 for key in ("rollout_tokens_per_s", "rollout_tokens_per_s_spread", "prefill_tokens_per_s")
        )
        assert HFBackend._ended.__name__ == "_ended", "the stop decision is put back"
    else:
        assert set(found["ways"]) == set(gpu_update.ways_of("tiny"))
        assert 0 < found["mfu"] < found["mfu_prompts_repeated"] < 1
        assert found["update_s"] == min(way["update_s"] for way in found["ways"].values())


@pytest.mark.parametrize(
    ("shape", "billions", "tokens", "gb"), [("0.5b", 0.494, 16384, 20.7), ("3b", 3.086, 16384, 91.9)]
)
def test_the_expected_memory_of_an_update(shape, billions, tokens, gb):
    assert sum(gpu_shapes.counts(shape).values()) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert gpu_shapes.expected_update_gb(shape, tokens, checkpointing=False) == pytest.approx(gb, abs=0.1)
    assert gpu_shapes.expected_update_gb("tiny", tokens, checkpointing=False) is None


def a_run(accuracies: list[float], drawn: list[float] | None = None) -> RunRecord:
    """Steps of 10 and 20 seconds and 4 prompts of 2 completions, evaluated before, between and after."""
    training = [{"step": i + 1, "step_time": 10.0 * (i + 1)} for i in range(2)]
    for row, groups in zip(training, drawn or [], strict=False):
        row["dynamic_sampling/groups_drawn"] = groups
    evaluation = [
        {
            "step": step,
            "eval/accuracy": accuracy,
            "eval/accuracy_low": accuracy - 0.1,
            "eval/accuracy_high": accuracy + 0.1,
            "eval/completions/mean_length": 50.0,
        }
        for step, accuracy in enumerate(accuracies)
    ]
    recipe = {"training": {"prompts_per_step": 4}, "rollout": {"num_generations": 2}, "data": {"eval_size": 8}}
    environment = {
        "python": "3.11",
        "packages": {"torch": "2", "transformers": "5"},
        "cpu": {"model": "c", "cores": 2},
        "threads": 1,
        "source": {"commit": "abcdef0123"},
    }
    return RunRecord(Path("r"), training, evaluation, recipe, "", environment)


def variant_run(variant: str, seed: int, accuracies: list[float], drawn: list[float] | None = None) -> algorithms.Curve:
    return algorithms.curve(variant, seed, a_run(accuracies, drawn))


def test_curves_count_seconds_and_samples_until_each_evaluation():
    plain = variant_run("dapo", 0, [0.1, 0.2, 0.4])
    assert plain.seconds_E.tolist() == [0, 10, 30]
    assert plain.samples_E.tolist() == [0, 8, 16]
    dynamic = variant_run("dapo+dynamic", 0, [0.1, 0.3, 0.5], drawn=[6.0, 9.0])
    assert dynamic.samples_E.tolist() == [0, 12, 30]


def test_staleness_is_compared_over_wall_clock_evaluations_included(tmp_path: Path):
    """The clock starts with the first evaluation's line; a line of metrics that is not an evaluation's is a step's."""
    run = replace(a_run([0.1, 0.2, 0.4]), folder=tmp_path)
    for row, age in zip(run.training, (0.0, 1.5), strict=True):
        row |= {"sampling/staleness/mean": age, "sampling/staleness/max": 2 * age, "time/rollout": 4.0}
    lines = [run.evaluation[0], run.training[0], run.evaluation[1], run.training[1], run.evaluation[2]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / staleness.WALL).write_text(json.dumps([0.0, 7.0, 9.0, 20.0, 25.0]))
    found = staleness.wall_curve(2, 0, run)
    assert (found.variant, found.seconds_E.tolist(), found.samples_E.tolist()) == (
        "max_staleness 2", [0, 9, 25], [0, 8, 16]
    )  # fmt: skip
    cells = [cell.strip() for cell in staleness.of_steps([found], [run]).splitlines()[-1].split("|")[1:-1]]
    assert cells[:6] == ["`max_staleness 2`", "0", "0.75", "3", "15.0", "4.0"]


def test_the_staleness_runs_are_recipes(tmp_path: Path):
    options = argparse.Namespace(steps=3, eval_every=2, vllm_python="python", set=["data.eval_size=8"])
    _, _, name, *overrides = staleness.command(4, 1, tmp_path, options)
    recipe = load_recipe(name, overrides)
    assert (recipe.rollout.max_staleness, recipe.training.seed, recipe.training.max_seconds) == (4, 1, None)


def test_variants_are_compared_after_the_same_seconds_and_the_same_samples():
    curves = [
        variant_run("dapo", 0, [0.1, 0.2, 0.4]),
        variant_run("dapo", 1, [0.1, 0.4, 0.6]),
        variant_run("dapo+dynamic", 0, [0.1, 0.3, 0.5], drawn=[6.0, 9.0]),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in algorithms.table(curves).splitlines()]
    assert lines[0][8:10] == ["after 30 s", "after 16 samples"]
    assert [line[:2] for line in lines[2:]] == [
        ["`dapo`", "0"], ["`dapo`", "1"], ["`dapo+dynamic`", "0"],
        ["**`dapo`**", "mean of 2"], ["**`dapo+dynamic`**", "mean of 1"],
    ]  # fmt: skip
    assert lines[4][8:10] == ["0.500", "0.344"], "of 12 samples 0.3 and of 30 0.5: a part of the way"
    assert lines[5][5:10] == ["0.100", "0.500", "0.500", "0.500", "0.500"]


def test_every_named_variant_is_an_override_and_another_is_refused():
    assert algorithms.overrides("dapo+few+curriculum") == [
        *algorithms.LOSSES["dapo"], *algorithms.MORE["few"], *algorithms.MORE["curriculum"]
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="'dapo\\+dynamics': dynamics is unknown"):
        algorithms.overrides("dapo+dynamics")
    for more in algorithms.MORE:
        assert load_recipe("recipes/demo_cpu.yaml", algorithms.overrides(f"dapo+{more}"))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_finds_what_it_imports(path):
    import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_r1s_stages_are_compared_on_the_same_tasks(tmp_path):
    tasks = [f"{i} 1 1 = 2" for i in range(200)]

    def measured(seed, stage, solved, formed):
        folder = tmp_path / f"{'zero' if stage == 'zero' else 'chain'}_seed{seed}" / stage
        folder.mkdir(parents=True)
        rows = [
            {"prompt": task, "rewards": {"countdown": float(i < solved), "form": float(i >= 200 - formed)}}
            for i, task in enumerate(tasks)
        ]
        (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for stage, solved, formed in (("cold", 60, 110), ("rl", 100, 60), ("again", 99, 80), ("rl2", 120, 80)):
        measured(0, stage, solved, formed)
        measured(1, stage, solved - 30 * (stage == "again"), 60)
    measured(0, "zero", 50, 40)
    measured(1, "zero", 119, 40)
    found = {one["ordering"]: [row["holds"] for row in one["by_seed"]] for one in r1.compared(tmp_path, [0, 1])}
    assert found == {
        "rl solves more than cold": [True, True],
        "again solves no less than rl": [True, False],
        "again is better formed than rl": [True, False],
        "rl2 solves more than zero": [True, False],
    }
    with pytest.raises(ValueError, match="different tasks"):
        r1.paired({"a": 1}, {"b": 1})


def test_r1s_table_has_each_seed_and_the_mean_over_them():
    around = {"accuracy_low": 0.1, "accuracy_high": 0.7, "form": 0.5, "form_low": 0.4, "form_high": 0.6}
    rows = {
        seed: [
            {"name": "cold", "accuracy": accuracy, "length": 80.0, "seconds": 60.0, **around},
            {"name": "sampled", "accuracy": None, "form": None, "length": None, "seconds": 20.0, "rows": 1500},
        ]
        for seed, accuracy in ((0, 0.3), (1, 0.5))
    }
    cold, sampled = r1.stages_of(rows)
    assert cold["accuracy"] == pytest.approx(0.4)
    assert [row["seed"] for row in cold["by_seed"]] == [0, 1]
    assert sampled["accuracy"] is None
    seen = {"seed": 1, "difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.001, "holds": True}
    ordering = {"ordering": "rl2 solves more than zero", "figure": "accuracy", "by_seed": [seen]}
    table = r1.table({"stages": [cold, sampled], "orderings": [ordering]})
    assert "| rl2 solves more than zero (accuracy) | 1 | +0.200 [+0.100, +0.300] | 0.001 | yes |" in table
    assert "| cold | 1 | 0.500 [0.100, 0.700] | 80 | 0.500 [0.400, 0.600] | 60 |" in table
    assert "1,500 rows kept" in table
