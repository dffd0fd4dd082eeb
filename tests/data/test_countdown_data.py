"""data/countdown.py: every task has a solution, the splits share none, rows depend on nothing but seed and range."""

from __future__ import annotations

import time
from fractions import Fraction
from itertools import combinations_with_replacement, permutations, product

import numpy as np
import pytest

from data import countdown

SMALL = {"min_numbers": 3, "max_numbers": 3, "max_number": 9, "min_target": 1, "max_target": 60}


def keys(dataset) -> list[tuple[int, ...]]:
    return [(*sorted(nums), target) for nums, target in zip(dataset["nums"], dataset["target"], strict=True)]


def reachable(nums: tuple[int, ...]) -> set[Fraction]:
    """An independent solver: all values of all orders, operators and both shapes of three numbers."""

    def results(a: Fraction, b: Fraction) -> list[Fraction]:
        return [a + b, a - b, a * b, *([a / b] if b else [])]

    values = set()
    for a, b, c in permutations(map(Fraction, nums)):
        for left in results(a, b):
            values.update(results(left, c))
        for right in results(b, c):
            values.update(results(a, right))
    return values


def evaluate(text: str) -> Fraction:
    import ast

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        a, b = value(node.left), value(node.right)
        operations = {ast.Add: a.__add__, ast.Sub: a.__sub__, ast.Mult: a.__mul__, ast.Div: a.__truediv__}
        return operations[type(node.op)](b)

    return value(ast.parse(text, mode="eval").body)


def test_the_small_range_is_covered_completely():
    """Both splits together are exactly the solvable tasks, each once; every one is in one split."""
    train, held_out = keys(countdown.build("train", None, 0, **SMALL)), keys(countdown.build("eval", None, 0, **SMALL))
    expected = {
        (*nums, target)
        for nums in combinations_with_replacement(range(1, 10), 3)
        for target in reachable(nums) & set(range(1, 61))
    }
    assert len(train) + len(held_out) == len(set(train) | set(held_out)) == len(expected)
    assert set(train) | set(held_out) == expected
    assert len(held_out) >= 500  # what the demo evaluates on


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (7, 3)])
def test_no_task_is_in_both_splits_whatever_the_seeds(seeds):
    train = countdown.build("train", 3000, seeds[0], max_number=20, max_target=40)
    held_out = countdown.build("eval", 1500, seeds[1], max_number=20, max_target=40)
    assert not set(keys(train)) & set(keys(held_out))
    assert len(set(keys(train))) == 3000
    assert len(set(keys(held_out))) == 1500


def test_the_split_of_a_task_does_not_depend_on_the_range():
    held_out = set(keys(countdown.build("eval", None, 0, **SMALL)))
    assert not held_out & set(keys(countdown.build("train", None, 5, **(SMALL | {"max_number": 12, "max_target": 90}))))


def test_the_defaults_are_those_of_countdown_tasks_3to4():
    rows = countdown.build("train", 2000, 0)
    assert {len(nums) for nums in rows["nums"]} == {3, 4}
    assert 800 < sum(len(nums) == 3 for nums in rows["nums"]) < 1200
    numbers = {n for nums in rows["nums"] for n in nums}
    assert (min(numbers), max(numbers)) == (1, 99)
    assert (min(rows["target"]), max(rows["target"])) == (10, 100)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_task_has_a_solution_with_every_number_once(n):
    rows = countdown.build("eval", {4: 40, 5: 6}.get(n, 200), 3, min_numbers=n, max_numbers=n)
    for nums, target in zip(rows["nums"], rows["target"], strict=True):
        text = next(countdown.solutions(nums, target))
        assert evaluate(text) == target
        assert sorted(
            int(word) for word in text.replace("(", " ").replace(")", " ").split() if word.isdigit()
        ) == sorted(nums)


def test_the_fast_solver_agrees_with_the_expression_search():
    generator = np.random.default_rng(0)
    nums_NK, targets_N = generator.integers(1, 14, (60, 4)), generator.integers(1, 200, 60)
    slow = [
        next(countdown.solutions(nums, t), None) is not None
        for nums, t in zip(nums_NK.tolist(), targets_N, strict=True)
    ]
    assert countdown.solvable(nums_NK, targets_N).tolist() == slow
    assert 0 < sum(slow) < 60


def test_the_fast_solver_needs_no_division_by_zero():
    assert countdown.solvable(np.array([[1, 1, 5], [2, 2, 2], [8, 8, 3]]), np.array([5, 7, 3])).tolist() == [
        True,
        False,
        True,
    ]
    assert countdown.solvable(np.array([[8, 8, 3, 3]]), np.array([24])).tolist() == [True]  # only by a fraction


def test_solutions():
    assert set(countdown.solutions([6, 3, 9], 27)) == {"(6 - 3) * 9", "6 * 3 + 9"}
    assert list(countdown.solutions([8, 8, 3, 3], 24)) == ["8 / (3 - 8 / 3)"]
    assert list(countdown.solutions([2, 2], 5)) == []
    texts = list(countdown.solutions([1, 2, 3, 4], 24))
    assert len(texts) == len(set(texts)) > 5
    assert {evaluate(text) for text in texts} == {Fraction(24)}


def test_subtraction_and_division_keep_their_parentheses():
    for nums, target in product([(2, 3, 7), (4, 6, 9), (12, 2, 3)], range(1, 30)):
        assert all(evaluate(text) == target for text in countdown.solutions(list(nums), target))


@pytest.mark.parametrize("arguments", [{}, SMALL])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_rows_are_a_function_of_the_seed_and_not_of_the_size(arguments, split):
    few, many = countdown.build(split, 100, 11, **arguments), countdown.build(split, 500, 11, **arguments)
    assert few.to_list() == many.select(range(100)).to_list()
    assert few.to_list() == countdown.build(split, 100, 11, **arguments).to_list()
    assert few.to_list() != countdown.build(split, 100, 12, **arguments).to_list()


def test_known_rows_stay_what_they_are():
    """Held-out tasks of published numbers must not move with a release."""
    rows = countdown.build("eval", 3, 0, **SMALL)
    assert list(zip(rows["nums"], rows["target"], strict=True)) == [([4, 8, 4], 1), ([6, 3, 3], 21), ([9, 3, 2], 6)]


def test_one_count_of_numbers_running_out_leaves_the_others():
    rows = countdown.build("train", None, 0, min_numbers=2, max_numbers=3, max_number=5, min_target=1, max_target=10)
    assert len(set(keys(rows))) == len(rows) > 50
    assert {len(nums) for nums in rows["nums"][:20]} == {2, 3}


def test_questions():
    tinyzero = countdown.build("train", 1, 0)[0]
    assert tinyzero["prompt"].startswith(
        f"Using the numbers {tinyzero['nums']}, create an equation that equals {tinyzero['target']}. You can use basic "
        f"arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think>"
    )
    compact = countdown.build("train", 1, 0, question="compact", **SMALL)[0]
    assert compact["prompt"] == f"{' '.join(map(str, compact['nums']))} = {compact['target']}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "test"}, "split is train or eval"),
        ({"question": "long"}, "question is one of tinyzero, compact"),
        ({"min_numbers": 5, "max_numbers": 4}, "min_numbers <= max_numbers"),
        ({"min_number": 0}, "1 <= min_number"),
        ({"max_numbers": 7}, "max_numbers <= 6"),
        ({"max_target": "100"}, "max_target is an integer, not '100'"),
        ({"max_number": 10**6}, "64-bit"),
    ],
)
def test_a_senseless_range_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        countdown.build(**{"split": "train", "size": 1, **arguments})


def test_more_rows_than_there_are_tasks_is_refused_with_their_number():
    there_are = len(countdown.build("eval", None, 0, **SMALL))
    with pytest.raises(ValueError, match=f"only {there_are} distinct eval tasks.*{there_are + 1} were asked for"):
        countdown.build("eval", there_are + 1, 0, **SMALL)


def test_a_range_too_large_to_list_but_poor_in_tasks_ends_too(monkeypatch):
    monkeypatch.setattr(countdown, "ENUMERATE_UP_TO", 0)
    monkeypatch.setattr(countdown, "GIVE_UP_AFTER", 20_000)
    sampled = set(keys(countdown.build("eval", None, 0, **SMALL)))
    monkeypatch.undo()
    assert sampled == set(keys(countdown.build("eval", None, 0, **SMALL)))


def test_two_thousand_rows_are_quick():
    started = time.process_time()
    countdown.build("train", 2000, 0)
    assert time.process_time() - started < 5
