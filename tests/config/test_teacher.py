"""The section `teacher`: what it may be combined with, and what is refused, in words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from grpo.config import Recipe

MODEL = {"model": {"name": "m"}, "data": {"name": "countdown"}, "training": {"output_dir": "x"}}
SERVER = "http://127.0.0.1:8000"


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(MODEL | sections)


def said(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        recipe(**sections)
    return str(caught.value)


def test_a_recipe_may_learn_from_its_teacher_alone_and_measure_rewards() -> None:
    alone = recipe(teacher={"name": "t"})
    assert not alone.learns_from_rewards
    assert alone.teacher is not None
    assert alone.teacher.divergence == "reverse_kl"
    measured = recipe(teacher={"name": "t"}, rewards=[{"name": "countdown", "weight": 0}])
    assert not measured.learns_from_rewards
    assert measured.judged_by() == "countdown"
    assert recipe(teacher={"name": "t"}, rewards=[{"name": "countdown"}]).learns_from_rewards
    assert "needs at least one reward, or a teacher" in said()
    assert "every weight is 0" in said(rewards=[{"name": "countdown", "weight": 0}])


def test_supervised_distillation_is_of_the_forward_kl_unless_it_says_otherwise() -> None:
    assert recipe(stage="sft", teacher={"name": "t"}).teacher.divergence == "forward_kl"
    assert recipe(stage="sft", teacher={"column": "c", "divergence": "jsd"}).teacher.divergence == "jsd"
    assert recipe(stage="sft", teacher={"url": SERVER, "top_k": 20}).teacher.urls() == [SERVER]


def test_a_resolved_recipe_is_read_again_as_it_is() -> None:
    made = recipe(teacher={"url": [f"{SERVER}/", "http://b:1"], "top_k": 5})
    assert Recipe.model_validate(made.model_dump()) == made
    assert made.teacher.urls() == [SERVER, "http://b:1"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {}}, "give exactly one of name, url, column (given: none)"),
        ({"teacher": {"name": "t", "url": SERVER}}, "give exactly one of name, url, column (given: name, url)"),
        ({"teacher": {"name": "t", "top_k": 5}}, "top_k is only used with url (the teacher is given by name)"),
        (
            {"teacher": {"url": SERVER, "dtype": "float32"}},
            "dtype is only used with name (the teacher is given by url)",
        ),
        ({"teacher": {"url": "localhost:80"}}, "url: localhost:80 is not a server's URL"),
        ({"teacher": {"url": [SERVER, SERVER]}}, "url names a server twice"),
        ({"teacher": {"name": "t", "jsd_beta": 0.3}}, "jsd_beta is only used with divergence: jsd"),
        ({"teacher": {"column": "c"}}, "it must judge what the student samples: give teacher.name or teacher.url"),
        ({"teacher": {"name": "t", "text_coef": 1.0}}, "teacher.text_coef is only used with stage: sft"),
        ({"teacher": {"url": SERVER}, "rollout": {"temperature": 0.7}}, "rollout.temperature (0.7) must be 1.0"),
        (
            {"teacher": {"url": SERVER, "divergence": "forward_kl"}},
            "forward_kl needs more of the teacher's distribution",
        ),
        (
            {"teacher": {"url": SERVER}, "rollout": {"top_p": 0.9}},
            "a teacher of the sampled tokens alone (url) estimates",
        ),
        (
            {"teacher": {"name": "t", "whole_sequence": True}, "rollout": {"top_k": 9}},
            "teacher.whole_sequence estimates",
        ),
        ({"teacher": {"name": "t", "whole_sequence": True, "divergence": "jsd"}}, "is of the reverse KL"),
        (
            {"teacher": {"name": "t"}, "prompts": {"dynamic_sampling": True}},
            "prompts.dynamic_sampling is about rewards",
        ),
        (
            {"teacher": {"name": "t"}, "algorithm": {"beta": 0.1, "kl_in_reward": True}},
            "algorithm.kl_in_reward is about",
        ),
        ({"stage": "sft", "teacher": {"url": SERVER}}, "teacher.url with stage sft needs teacher.top_k"),
        (
            {"stage": "sft", "teacher": {"name": "t", "whole_sequence": True}},
            "needs the student's own samples: stage grpo",
        ),
    ],
)
def test_what_does_not_go_together(sections: dict[str, Any], message: str) -> None:
    assert message in said(**sections)


def test_what_does() -> None:
    recipe(teacher={"name": "t"}, rollout={"temperature": 0.7, "top_p": 0.9})
    recipe(teacher={"url": SERVER, "top_k": 20, "divergence": "forward_kl"}, rollout={"top_p": 0.9})
    recipe(teacher={"name": "t", "whole_sequence": True}, rollout={"temperature": 0.7})
    recipe(teacher={"name": "t"}, rewards=[{"name": "countdown"}], prompts={"dynamic_sampling": True})
