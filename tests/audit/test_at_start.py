"""Before a run starts, it is said where right answers are not paid; and nothing is said where they are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from grpo.audit import at_start
from grpo.audit.at_start import audit_at_start
from grpo.audit.cases import Form
from grpo.config.find import SHIPPED
from grpo.config.load import load_recipe
from grpo.prompts.task import Task, load_task
from grpo.scoring.scorer import Scorer
from tests.conftest import make_recipe
from tests.prompts.small_rows import make_tokenizer, write_rows

MINE = """
import re, time

def text(completion):
    found = re.findall("<answer>(.*?)</answer>", completion)
    return found[-1].strip() if found else ""

def compares(completions, answer, **_): return [float(text(c) == a) for c, a in zip(completions, answer)]
def as_text(completions, answer, **_): return [float(text(c) == str(a)) for c, a in zip(completions, answer)]
def one_of(completions, answer, **_): return [float(text(c) in a) for c, a in zip(completions, answer)]
def below_zero(completions, answer, **_): return [float(text(c) == a) - 1 for c, a in zip(completions, answer)]
def half(completions, answer, **_): return [0.5 * (text(c) == a) for c, a in zip(completions, answer)]
def always(completions, **_): return [1.0 for _ in completions]
def brief(completions, **_): return [0.2 for _ in completions]
def hangs(completions, **_): time.sleep(60)
def fails(completions, **_): return [1 / 0]
def wrong_length(completions, **_): return []
async def asks_a_server(completions, **_): open("asked", "w")
"""


def lines(folder: Path, function: str, answers: list, **reward) -> list[str]:
    (folder / "mine.py").write_text(MINE)
    path = write_rows(folder / "rows.jsonl", [{"prompt": f"what is {i} ?", "answer": a} for i, a in enumerate(answers)])
    given = {"name": function} if function == "gsm8k" else {"path": f"{folder}/mine.py:{function}", **reward}
    data, training = {"name": None, "path": path, "eval_size": 0}, {"prompts_per_step": 2}
    made = make_recipe(folder, data=data, rewards=[given], training=training)
    with Scorer(made.rewards, made.scoring) as scorer:
        return audit_at_start(made, load_task(made, make_tokenizer()), scorer)


def test_an_answer_of_another_type_is_found(tmp_path: Path) -> None:
    (line,) = lines(tmp_path, "compares", list(range(30)))
    assert line.startswith(
        "rewards[0] (compares): the right answers of 16 rows get 0 in every usual form, no more than"
    )
    assert "The column 'answer' holds 28, and a completion is text: '28'; are the two equal to it?" in line
    assert lines(tmp_path, "compares", list(map(str, range(30)))) == []
    assert lines(tmp_path, "as_text", list(range(30))) == []


@pytest.mark.parametrize(
    ("function", "answers", "said"),
    [
        ("as_text", [3.0, 4.0], "holds 4.0, and a completion is text: '4'"),
        ("compares", [True, False], "holds False, and a completion is text: 'False'"),
        ("compares", [" 3", "4 "], "holds '4 ', and a completion is text: '4'"),
        ("compares", [[3], [4]], "holds 4, and a completion is text: '4'"),
        ("below_zero", [3, 4], "holds 4, and a completion is text: '4'"),
    ],
)
def test_answers_of_any_other_type_are_found(tmp_path: Path, function: str, answers: list, said: str) -> None:
    (line,) = lines(tmp_path, function, answers)
    assert said in line


def test_answers_that_are_found_among_others_are_paid(tmp_path: Path) -> None:
    assert lines(tmp_path, "one_of", [["3", "4"], ["5"]]) == []
    assert lines(tmp_path, "as_text", [3.0, 2.5]) == []
    assert lines(tmp_path, "compares", [None, None]) == []


def test_a_built_in_reward_that_does_not_pay_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(tmp_path, "gsm8k", ["so #### 7"] * 4) == []
    monkeypatch.setattr(at_start, "forms", lambda *_: (Form("the answer and one more", "<answer>{answer}1</answer>"),))
    assert lines(tmp_path, "gsm8k", ["so #### 7"] * 4) == [
        f"rewards[0] (gsm8k): the right answer of 4 of 4 rows is not paid 1 (first {tmp_path}/rows.jsonl:1); "
        "grpo audit says more"
    ]


@pytest.mark.parametrize("function", ["half", "always", "fails", "wrong_length", "asks_a_server"])
def test_no_alarm_where_nothing_is_known_to_be_wrong(tmp_path: Path, function: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lines(tmp_path, function, ["1", "2", "3"]) == []
    assert not Path("asked").exists()


def test_shaping_is_asked_nothing(tmp_path: Path) -> None:
    (line,) = lines(tmp_path, "brief", ["1", "2", "3"])
    assert "say shaping: true" in line
    assert lines(tmp_path, "brief", ["1", "2", "3"], shaping=True) == []


@pytest.mark.slow
def test_a_function_that_hangs_does_not_keep_the_run_waiting(tmp_path: Path) -> None:
    start = time.perf_counter()
    assert lines(tmp_path, "hangs", ["1", "2", "3"]) == []
    assert time.perf_counter() - start < 8  # one call of a second; the rest is starting and killing a worker


@pytest.mark.slow
@pytest.mark.parametrize("name", [file.stem for file in sorted(SHIPPED.glob("*.yaml"))])
def test_no_alarm_on_our_own_recipes(name: str) -> None:
    recipe = load_recipe(name)
    if recipe.stage == "sft" or recipe.data.name not in ("countdown", "one_liners", "word_sums"):
        pytest.skip("its rows come from the hub, or nothing is rewarded")
    task: Task = load_task(recipe, make_tokenizer())
    with Scorer(recipe.rewards, recipe.scoring) as scorer:
        start = time.perf_counter()
        assert audit_at_start(recipe, task, scorer) == []
        assert time.perf_counter() - start < 2
