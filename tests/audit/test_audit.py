"""``grpo audit``: sound rewards pass, and each hole of a reward is found by a cheat that fits it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from grpo.audit.audit import audit, fill, spread
from grpo.audit.cases import ANSWER, BOXED, FENCED_IN_TAGS, GOLD, TAGS, USUAL, WRONG, cases, gold_answer, wrong_answer
from grpo.audit.programs import HARD_CODED, programs
from grpo.audit.standard import kind_of
from grpo.cli.main import app
from grpo.config import Recipe, RewardConfig
from grpo.errors import RunError, UserError
from grpo.scoring import functions
from grpo.scoring.functions import judged_by
from grpo.types import Status
from rewards import REWARDS
from rewards.countdown import verify as verify_countdown
from rewards.gsm8k import verify as verify_gsm8k
from tests.cli.test_cli import python

FUNCTIONS = r"""
import re

def sound(completions, answer, **kwargs):
    form = r"(<think>)?[^<>]*</think>\s*<answer>%s</answer>\s*"
    return [float(bool(re.fullmatch(form % re.escape(a), c))) for c, a in zip(completions, answer)]

def substring(completions, answer, **kwargs):
    return [float(a in c) for c, a in zip(completions, answer)]

def evals(completions, answer, **kwargs):
    def one(completion, answer):
        found = re.findall("<answer>(.*?)</answer>", completion, re.DOTALL)
        try:
            return float(str(eval(found[-1])) == answer)
        except Exception:
            return 0.0
    return [one(c, a) for c, a in zip(completions, answer)]

def always(completions, **kwargs): return [1.0 for _ in completions]
def shorter(completions, **kwargs): return [-len(c) / 1000 for c in completions]
def brief(completions, **kwargs): return [0.3 / (1 + len(c)) if c else 0.3 for c in completions]
def own_form(completions, answer, **kwargs):
    return [float(c.strip().endswith("THE ANSWER: " + a)) for c, a in zip(completions, answer)]
def broken(completions, **kwargs): return [1 / 0 for _ in completions]
def chat(completions, answer, **kwargs):
    return [float(c[0]["content"].endswith(f"<answer>{a}</answer>")) for c, a in zip(completions, answer)]
def wrong_length(completions, **kwargs): return [1.0]
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that it is put back
    Path("mine.py").write_text(FUNCTIONS)
    write("sums.jsonl", [{"prompt": f"{i} plus 40?", "answer": str(i + 40)} for i in range(6)])


def write(file: str, rows: list[dict]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(*rewards: dict, path: str = "sums.jsonl", **data) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "no/model"},
            "data": {"path": path, "eval_size": 2, **data},
            "rewards": list(rewards),
            "training": {"output_dir": "run", "prompts_per_step": 1},
            "scoring": {"timeout": 1.0},
        }
    )


def report(*rewards: dict, rows: int = 200, gold: str | None = None, **data) -> tuple[str, list[str]]:
    told: list[str] = []
    findings = audit(recipe(*rewards, **data), rows, gold, told.append)
    return "\n".join(told), findings


# --- the built-in rewards ---


@pytest.mark.slow
def test_built_in_rewards_are_sound():
    write("gsm8k.jsonl", [{"prompt": f"{i} plus 40?", "answer": f"so\n#### {i + 40}"} for i in range(6)])
    text, findings = report(
        {"name": "gsm8k"},
        {"name": "format"},
        {"name": "format", "args": {"graded": True}},
        {"name": "cosine", "args": {"verifier": "gsm8k", "max_completion_length": 512}},
        {"name": "overlong", "args": {"max_completion_length": 512, "soft_punish_cache": 64}},
        {"name": "repetition"},
        {"name": "language"},
        path="gsm8k.jsonl",
        template="tinyzero",
    )
    assert findings == []
    assert "prefill   '<think>'" in text
    assert text.count("6 of 6 rows pay at least") == 4
    assert text.count(", 0 kinds paid") == 4
    assert text.count("shapes and is not judged") == 3


@pytest.mark.slow
def test_math_is_sound_in_either_form():
    answers = ["42", "\\frac{1}{2}", "x+1", "(1,2)", "[3,\\infty)", "1,000", "0.5", "so $\\boxed{7}$", "so\n#### 8"]
    write("math.jsonl", [{"prompt": f"{i}?", "answer": answer} for i, answer in enumerate(answers)])
    text, findings = report({"name": "math"}, path="math.jsonl")
    assert findings == []
    assert "as \\boxed{…}" in text
    text, findings = report({"name": "math"}, {"name": "format"}, path="math.jsonl")
    assert findings == []
    assert "as <answer>\\boxed{…}</answer>" in text


def test_code_and_tests_that_are_too_weak():
    tests = [
        {"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 3]},
        {"fn_name": None, "inputs": ["1\n", "2\n"], "outputs": ["1\n", "2\n"]},
        {"fn_name": "f", "inputs": [[1], [2]], "outputs": [True, True]},
    ]
    solutions = ["def f(x):\n    return x + 1", "print(input())", "def f(x):\n    return x > 0"]
    rows = [
        {"prompt": f"{i}?", "tests": json.dumps(test), "solution": solution}
        for i, (test, solution) in enumerate(zip(tests, solutions, strict=True))
    ]
    write("code.jsonl", rows)
    try:
        text, findings = report({"name": "code"}, {"name": "format"}, path="code.jsonl", eval_size=0)
    except UserError as why:
        pytest.skip(str(why))
    assert findings == [f"rewards[0] code: it pays for {HARD_CODED}"]
    assert f"PAID 1 for {HARD_CODED} (1 row), first code.jsonl:3" in text
    assert "3 of 3 rows pay at least 1 for the right answer, as a fenced block in <answer> tags" in text
    write("code.jsonl", [{key: row[key] for key in ("prompt", "tests")} for row in rows[:2]])
    text, findings = report({"name": "code"}, path="code.jsonl", eval_size=0)
    assert findings == []
    assert "gold      not available" in text


def test_countdown_names_rows_that_nobody_can_solve():
    good, bad = {"prompt": "a", "nums": [1, 2, 3], "target": 6}, {"prompt": "b", "nums": [1, 1], "target": 50}
    write("rows.jsonl", [{**good, "prompt": f"{i}"} for i in range(4)] + [bad])
    text, findings = report({"name": "countdown"}, path="rows.jsonl", eval_size=0)
    assert findings == ["rewards[0] countdown: the right answer is not paid 1 in 1 of 5 rows"]
    assert "FAILS rows.jsonl:5: unsolvable" in text


def test_broken_gold_is_named_by_its_line():
    rows = [{"prompt": f"{i}?", "answer": f"#### {i}"} for i in range(5)]
    write("rows.jsonl", [*rows, {"prompt": "x?", "answer": "#### about 3"}])
    text, findings = report({"name": "gsm8k"}, path="rows.jsonl", eval_size=0)
    assert findings == ["rewards[0] gsm8k: the right answer is not paid 1 in 1 of 6 rows"]
    assert "FAILS rows.jsonl:6: no reward (gold_unparseable)" in text


def test_rows_are_sampled_evenly_and_counted():
    text, findings = report({"path": "mine.py:sound"}, rows=2)
    assert findings == []
    assert text.startswith("rows      2 of 4 to train on, 2 of 2 held out\ntokenizer none")
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(3), 3) == [0, 1, 2]


def test_tokenizer_and_chat_template_of_a_model_that_is_here(tiny_model):
    told: list[str] = []
    overlong = {"name": "overlong", "args": {"max_completion_length": 64, "soft_punish_cache": 32}}
    here = recipe({"path": "mine.py:sound"}, overlong)
    here = here.model_copy(update={"model": here.model.model_copy(update={"name": str(tiny_model)})})
    assert audit(here, 2, None, told.append) == []
    assert "tokenizer none" not in told[0]


def test_chat_rows_without_a_tokenizer():
    messages = [{"role": "user", "content": "what?"}]
    write("chat.jsonl", [{"prompt": [*messages, *[]], "answer": str(40 + i)} for i in range(3)])
    text, findings = report({"path": "mine.py:chat"}, path="chat.jsonl", template="chat", eval_size=0)
    assert "template  chat, which the tokenizer would bring" in text
    assert findings  # it looks at the end alone
    assert "3 of 3 rows pay at least 1" in text


# --- people's own rewards ---


def test_a_sound_function():
    text, findings = report({"path": "mine.py:sound"})
    assert findings == []
    assert "6 of 6 rows pay at least 1 for the right answer, as <answer>" in text


def test_a_function_that_looks_for_the_answer_anywhere():
    text, findings = report({"path": "mine.py:substring"})
    assert len(findings) == 1
    for cheat in ("a thousand numbers", "the gold in the thinking alone", "two answers, or", "wrong = gold"):
        assert f"PAID 1 for {cheat} (6 rows), first sums.jsonl:1: " in text


@pytest.mark.slow
def test_a_function_that_runs_the_completion():
    text, findings = report({"path": "mine.py:evals"})
    assert "rewards[0] evals: it ran the text of a completion as a program (6 rows)" in findings
    assert "PAID 1 for code that gives the gold (6 rows)" in text
    assert "not scored: a power tower (2 rows)" in text  # and left out after that, at a timeout each


def test_functions_that_do_not_judge_the_answer():
    for function in ("always", "shorter"):
        text, findings = report({"path": f"mine.py:{function}"})
        assert findings == ["no reward of the recipe pays a right answer more than a wrong one"]
        assert "taken for shaping, not judged" in text
    assert report({"path": "mine.py:sound"}, {"path": "mine.py:shorter"})[1] == []


def test_shaping_is_what_the_recipe_says_is_shaping():
    """However much it pays, or how little: a bonus below 1 too."""
    rewards = {"path": "mine.py:sound"}, {"path": "mine.py:brief", "shaping": True}
    text, findings = report(*rewards)
    assert findings == []
    assert "rewards[1] brief" in text
    assert "it shapes and is not judged" in text
    text, findings = report(rewards[0], {"path": "mine.py:brief"})
    assert findings == ["rewards[1] brief: no form of the right answer scores 1"]
    assert "or say shaping: true" in text
    with pytest.raises(ValueError, match="shaping is for functions given by path"):
        recipe({"name": "countdown", "shaping": True})


def test_a_built_in_reward_is_what_its_module_says(monkeypatch):
    """As one that CONTRIBUTING adds: it is in no list of the audit."""
    assert {name: judged_by(name) for name in REWARDS} == {
        **dict.fromkeys(("code", "cosine", "countdown", "gsm8k", "math"), "answer"),
        **dict.fromkeys(("language", "overlong", "repetition"), "shaping"),
        "format": "form",
    }
    monkeypatch.setattr(functions, "REWARDS", (*REWARDS, "sums"))
    for judges, kind in (("answer", "user"), ("shaping", "shaping"), ("form", "format"), (None, "user")):
        module = SimpleNamespace() if judges is None else SimpleNamespace(JUDGES=judges)
        monkeypatch.setitem(sys.modules, "rewards.sums", module)
        assert kind_of(RewardConfig(name="sums")) == kind


def test_a_form_of_ones_own_is_told_by_a_template():
    text, findings = report({"path": "mine.py:own_form"})
    assert findings[0] == "rewards[0] own_form: no form of the right answer scores 1"
    assert "give its form by --gold" in text
    text, findings = report({"path": "mine.py:own_form"}, gold="so THE ANSWER: {answer}")
    assert "6 of 6 rows pay at least 1 for the right answer, as so THE ANSWER: {answer}" in text
    assert findings == ["rewards[0] own_form: it pays for thinking that never ends"]
    with pytest.raises(UserError, match=r"--gold: 'x \{y\}' names no column of the rows \(prompt, answer\)"):
        report({"path": "mine.py:own_form"}, gold="x {y}")


def test_a_function_that_fails_is_shown_with_its_traceback():
    text, findings = report({"path": "mine.py:broken"})
    assert findings
    assert "ZeroDivisionError" in text
    with pytest.raises(RunError, match="expected a list with one entry"):
        report({"path": "mine.py:wrong_length"})


def test_columns_that_are_missing_are_the_recipes_fault():
    with pytest.raises(UserError, match=r"args.verifier must name the built-in reward .* got 'nothing'"):
        report({"name": "cosine", "args": {"verifier": "nothing", "max_completion_length": 8}})
    with pytest.raises(UserError, match="needs nums, target: neither a column of the rows"):
        report({"name": "countdown"})


# --- the cases ---


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 60))
def test_answers_to_countdown_are_right_and_wrong(nums, target):
    columns = {"nums": nums, "target": target}
    gold, wrong = gold_answer("countdown", columns), None
    wrong = wrong_answer("countdown", gold, columns)
    assert verify_countdown(nums, target, TAGS.whole(wrong)).reward == 0
    if gold is not None:
        assert verify_countdown(nums, target, TAGS.whole(gold)).reward == 1


@given(st.text(min_size=1))
def test_a_wrong_answer_is_another_text(gold):
    assert wrong_answer("user", gold, {}) != gold


@given(st.integers(-(10**6), 10**6))
def test_wrong_numbers_are_wrong(number):
    columns = {"answer": f"#### {number}"}
    wrong = wrong_answer("gsm8k", gold_answer("gsm8k", columns), columns)
    assert verify_gsm8k(columns["answer"], TAGS.whole(wrong)).reward == 0


@pytest.mark.parametrize("form", USUAL)
@pytest.mark.parametrize("gold", ["42", "x + y", None])
def test_cases_have_names_of_their_own(form, gold):
    tried = list(cases("user", form, gold, {}, "what?", "/tmp/x"))
    assert len({case.name for case in tried}) == len(tried)
    names = {case.name: case for case in tried}
    assert (GOLD in names) == (gold is not None)
    assert names[WRONG].against == ANSWER
    assert gold is None or names["the gold, truncated"].status is Status.LENGTH
    assert all(case.text != form.whole(gold or "") for case in tried if case.against == ANSWER)


@pytest.mark.parametrize(
    ("tests", "hard_coded"),
    [
        ({"fn_name": "f", "inputs": [[1], [2]], "outputs": [1, 2]}, "def f(*args, **kwargs):\n    return 1"),
        ('{"fn_name": null, "inputs": ["1", "2"], "outputs": ["1\\n", "2\\n"]}', "print('1')"),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [1]}, None),
        ({"fn_name": "f", "test": "def check(candidate): pass"}, None),
        ("not JSON", None),
        (None, None),
    ],
)
def test_cheating_programs_are_python(tests, hard_coded):
    tried = dict(programs(tests, "/tmp/x"))
    for program in tried.values():
        compile(program, "program", "exec")
    assert tried.get(HARD_CODED) == hard_coded
    columns = {"tests": tests, "solution": "def f(x): return x"}
    assert {case.name for case in cases("code", FENCED_IN_TAGS, "x = 1", columns, "", "/tmp/x")} > tried.keys()


def test_right_answers_are_found_in_the_usual_columns():
    assert gold_answer("math", {"answer": "\\frac{1}{2}"}) == "\\frac{1}{2}"
    assert gold_answer("math", {"answer": "so $\\boxed{\\frac{1}{2}}$."}) == "\\frac{1}{2}"
    assert gold_answer("math", {"answer": "so\n#### 7 "}) == "7"
    assert gold_answer("math", {"answer": 7}) == "7"
    assert gold_answer("code", {"solutions": ["a", "b"]}) == "a"
    assert gold_answer("code", {"tests": "{}"}) is None
    assert gold_answer("user", {"completion": [{"role": "assistant", "content": "hi"}]}) == "hi"
    assert gold_answer("user", {"answer": "", "target": 3}) == "3"
    assert gold_answer("countdown", {"nums": "no", "target": None}) is None
    assert BOXED.body("{1}") == "\\boxed{{1}}"
    assert fill("{a} {b} {c}", {"a": 1, "b": "{a}"}) == "1 {a} {c}"
    assert fill("{a}", {"a": None}) is None


# --- the command ---


def test_command_exit_codes():
    Path("recipe.yaml").write_text(json.dumps(recipe({"path": "mine.py:substring"}).model_dump()))
    found = CliRunner().invoke(app, ["audit", "recipe.yaml", "--rows", "2"])
    assert (found.exit_code, found.stderr.splitlines()[0]) == (1, "recipe.yaml: the rewards are not sound:")
    assert "rewards[0] substring  (mine.py:substring)" in found.stdout
    wrong = CliRunner().invoke(app, ["audit", "recipe.yaml", "rewards.0.path=mine.py:nothing"])
    assert (wrong.exit_code, wrong.stdout.count("rewards[0]")) == (2, 0)
    assert "has no 'nothing'" in wrong.stderr


@pytest.mark.slow
def test_command_as_a_process(tmp_path):
    done = python("-m", "grpo", "audit", "demo_cpu", "--rows", "3", "data.eval_size=8", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rewards[0] countdown  (rewards.countdown.countdown_reward)" in done.stdout
    assert done.stdout.splitlines()[-1] == "OK demo_cpu: nothing was found"


def test_each_reward_of_a_mix_is_audited_on_its_sources() -> None:
    write("nums.jsonl", [{"prompt": f"{i} and 40", "nums": [i, 40], "target": i + 40} for i in range(6)])
    mix = [
        {"path": "sums.jsonl", "eval_size": 0, "rewards": [{"path": "mine.py:always"}]},
        {"path": "nums.jsonl", "eval_size": 0, "rewards": [{"name": "countdown"}, {"name": "format", "weight": 0.1}]},
    ]
    told: list[str] = []
    content = {
        "model": {"name": "no/such"},
        "data": {"mix": mix},
        "training": {"output_dir": "x", "prompts_per_step": 4},
    }
    findings = audit(Recipe.model_validate(content), 4, tell=told.append)
    assert findings == ["no reward of sums pays a right answer more than a wrong one"]
    assert [text.partition("  ")[0] for text in told[1:]] == [
        "data.mix[0].rewards[0] on sums always",
        "data.mix[1].rewards[0] on nums countdown",
        "data.mix[1].rewards[1] on nums format",
    ]
