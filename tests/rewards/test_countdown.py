"""Countdown's verifier: right answers score 1 however they are written, everything else 0, broken rows None."""

from __future__ import annotations

import itertools
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.countdown import countdown_reward, evaluate, verify
from rewards.verdict import Outcome


def outcome(nums, target, answer, **kwargs):
    return verify(nums, target, f"<think>hm</think><answer>{answer}</answer>", **kwargs).outcome


OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else None,
}


def solutions(nums):
    """Every expression over all of nums, fully parenthesized, with its value; knows nothing of parsing."""
    if len(nums) == 1:
        yield str(nums[0]), Fraction(nums[0])
        return
    indices = range(len(nums))
    for size in range(1, len(nums)):
        for chosen in itertools.combinations(indices, size):
            left = [nums[i] for i in chosen]
            right = [nums[i] for i in indices if i not in chosen]
            for (a, value_a), (b, value_b) in itertools.product(solutions(left), solutions(right)):
                for sign, compute in OPERATIONS.items():
                    if (value := compute(value_a, value_b)) is not None:
                        yield f"({a}{sign}{b})", value


@pytest.mark.parametrize("nums", [[3, 8], [7, 7, 1], [5, 3, 6], [100, 25, 0]])
def test_every_solution_scores_and_only_with_its_own_value(nums):
    found = 0
    for expression, value in solutions(nums):
        if value.denominator == 1:
            target = int(value)
            assert outcome(nums, target, expression) is Outcome.CORRECT, expression
            assert outcome(nums, target, f" {expression[1:-1]} = {target} ") is Outcome.CORRECT, expression
            assert outcome(nums, target + 1, expression) is Outcome.WRONG, expression
            assert outcome([*nums, 1], target, expression) is Outcome.WRONG, expression
            found += 1
    assert found > 5


trees = st.recursive(
    st.integers(0, 99),
    lambda children: st.tuples(children, st.sampled_from("+-*/"), children),
    max_leaves=6,
)
spaces = st.sampled_from(["", " ", "  ", "\t"])


def measure(tree):
    """Value (None where it divides by zero) and numbers of a tree."""
    if isinstance(tree, int):
        return Fraction(tree), [tree]
    (a, nums_a), (b, nums_b) = measure(tree[0]), measure(tree[2])
    value = None if a is None or b is None else OPERATIONS[tree[1]](a, b)
    return value, nums_a + nums_b


def written(tree, space):
    """The tree as a person writes it: parentheses only where precedence needs them."""
    if isinstance(tree, int):
        return str(tree)
    sign = tree[1]
    left, right = written(tree[0], space), written(tree[2], space)
    if isinstance(tree[0], tuple) and sign in "*/" and tree[0][1] in "+-":
        left = f"({left})"
    if isinstance(tree[2], tuple) and (sign in "-*/" if tree[2][1] in "+-" else sign in "*/"):
        right = f"({right})"
    return f"{left}{space}{sign}{space}{right}"


@settings(max_examples=100, deadline=None)
@given(trees, spaces)
def test_precedence_and_exact_arithmetic(tree, space):
    value, nums = measure(tree)
    expression = written(tree, space)
    if value is None:
        with pytest.raises(ZeroDivisionError):
            evaluate(expression)
        assert outcome(nums, 1, expression) is Outcome.WRONG
    else:
        assert evaluate(expression) == (value, nums)


@settings(max_examples=100, deadline=None)
@given(trees, trees, spaces)
def test_another_expression_scores_only_with_the_same_value_and_numbers(tree, other, space):
    value, nums = measure(tree)
    if value is None or value.denominator != 1:
        return
    other_value, other_nums = measure(other)
    same = other_value == value and sorted(other_nums) == sorted(nums)
    assert (outcome(nums, int(value), written(other, space)) is Outcome.CORRECT) == same


@settings(max_examples=100, deadline=None)
@given(trees, st.data())
def test_a_changed_character_scores_only_where_the_meaning_stays(tree, data):
    value, nums = measure(tree)
    if value is None or value.denominator != 1:
        return
    text = written(tree, "")
    position = data.draw(st.integers(0, len(text) - 1))
    changed = text[:position] + data.draw(st.sampled_from("0123456789+-*/(). _xe#=\n²")) + text[position + 1 :]
    if outcome(nums, int(value), changed) is Outcome.CORRECT:
        assert evaluate(changed)[0] == value
        assert sorted(evaluate(changed)[1]) == sorted(nums)
        assert set(changed) <= set("0123456789+-*/() ")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.text(alphabet="0123456789+-*/()= <>answerthink", max_size=60))
def test_no_text_raises(free, close):
    for text in (free, close, f"<answer>{free}</answer>", f"<answer>{close}</answer>"):
        assert verify([1, 2], 3, text).reward in (0.0, 1.0)


# What other verifiers accept, or crash on. nums are chosen so that a lenient reading would be right.
REFUSED = [
    ("power", [2, 3], 8, "2**3"),
    ("floor division", [7, 2], 3, "7//2"),
    ("decimal point", [1, 5, 2], 3, "1.5*2"),
    ("float", [5, 3], 15, "5.0*3"),
    ("leading point", [4, 5], 2, ".5*4"),
    ("unary minus", [3, 5], 2, "-3+5"),
    ("unary plus", [3, 5], 8, "+3+5"),
    ("unary inside", [3, 5], 15, "3*(+5)"),
    ("unary after operator", [3, 5], 8, "5--3"),
    ("tower", [99, 98, 97], 1, "99**98**97"),
    ("tower of nines", [9, 9, 9], 1, "9**9**9"),
    ("implicit product", [3, 8], 24, "(3)(8)"),
    ("implicit product 2", [3, 8], 24, "3(8)"),
    ("leading zero", [3, 8], 24, "03*8"),
    ("equation backwards", [3, 8], 24, "24=3*8"),
    ("only a claim", [3, 8], 24, "=24"),
    ("two claims", [3, 8], 24, "3*8=24=24"),
    ("double equals", [3, 8], 24, "3*8==24"),
    ("claim is an expression", [3, 8], 24, "3*8=(24)"),
    ("claim with zeros", [3, 8], 24, "3*8=024"),
    ("concatenation", [1, 2], 12, "1 2"),
    ("underscore", [1, 0], 10, "1_0"),
    ("exponent", [1, 1], 10, "1e1"),
    ("hex", [0, 16], 16, "0x10"),
    ("comment", [3, 8], 24, "3*8 # = 24"),
    ("unicode digits", [3, 8], 24, "\u0663*8"),
    ("superscript", [3, 9], 9, "3²"),
    ("times sign", [3, 8], 24, "3\u00d78"),
    ("wide minus", [8, 3], 5, "8\u22123"),
    ("no-break space", [3, 8], 24, "\u00a03*8"),
    ("latex", [3, 8], 24, "3 \\times 8"),
    ("code", [1, 1], 1, "__import__('os').system('true')"),
    ("call", [97], 97, "ord('a')"),
    ("two lines", [3, 8], 24, "3*8\n3*8"),
    ("list", [3, 8], 24, "3*8, 8*3"),
    ("two equations", [3, 8], 24, "3*8=24; 8*3=24"),
    ("prose", [3, 8], 24, "The answer is 3*8"),
    ("open parenthesis", [3, 8], 24, "(3*8"),
    ("closed twice", [3, 8], 24, "3*8)"),
    ("empty parentheses", [3, 8], 24, "3*8()"),
    ("dangling operator", [3, 8], 24, "3*8*"),
    ("deep", [3], 3, "(" * 10_000 + "3" + ")" * 10_000),
    ("deep and open", [3], 3, "(" * 200),
    ("long", [1] * 150, 150, "+".join("1" * 150)),
    ("many digits", [3, 8], 24, "9" * 100_000),
    ("bang", [4, 1], 24, "4!*1"),
    ("modulo", [7, 4], 3, "7%4"),
    ("bit operator", [3, 1], 6, "3<<1"),
    ("NUL", [3, 8], 24, "3*8\0"),
]
WRONG = [
    ("number twice", [3, 8], 24, "3*8+3-3"),
    ("one number twice", [3], 6, "3+3"),
    ("number unused", [3, 8, 1], 24, "3*8"),
    ("foreign number", [3, 8], 24, "3*8*1"),
    ("digits joined", [1, 2], 12, "12"),
    ("digits split", [12], 3, "1+2"),
    ("target alone", [3, 8], 24, "24"),
    ("target as claim", [3, 8], 24, "3+8=24"),
    ("other claim", [3, 8], 24, "3*8=25"),
    ("negative claim", [3, 8], 24, "3*8=-24"),
    ("division by zero", [3, 3, 8], 24, "8/(3-3)"),
    ("zero times division by zero", [0, 3, 3], 0, "0*(3/(3-3))"),
    ("right only in floats", [10**17, 1, 10**17], 0, f"({10**17}+1)-{10**17}"),
    ("integer division", [7, 2], 3, "7/2"),
]


@pytest.mark.parametrize(("nums", "target", "answer"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_refused(nums, target, answer):
    started = time.perf_counter()
    assert outcome(nums, target, answer) is Outcome.UNPARSEABLE
    assert time.perf_counter() - started < 0.1


@pytest.mark.parametrize(("nums", "target", "answer"), [c[1:] for c in WRONG], ids=[c[0] for c in WRONG])
def test_wrong(nums, target, answer):
    assert outcome(nums, target, answer) is Outcome.WRONG


@pytest.mark.parametrize(
    ("nums", "target", "answer"),
    [
        ([44, 20], 24, "44-20"),
        ([3, 8], 24, "3 * 8 = 24"),
        ([3, 8], 24, "\n (8)*((3)) =24\n"),
        ([3, 8, 1], -23, "1 - 3*8"),
        ([2, 7], -5, "2-7 = -5"),
        ([5, 5, 5, 1], 24, "5*(5-1/5)"),
        ([3, 3, 8, 8], 24, "8/(3-8/3)"),
    ],
)
def test_right(nums, target, answer):
    assert outcome(nums, target, answer) is Outcome.CORRECT


def test_a_tower_is_refused_in_microseconds():
    completion = "<answer>99**98**97</answer>"
    fastest = min(_seconds(lambda: verify([99, 98, 97], 1, completion)) for _ in range(20))
    assert fastest < 500e-6


def _seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


RIGHT = "<answer>3*8</answer>"


@pytest.mark.parametrize(
    ("completion", "prefill", "expected"),
    [
        (RIGHT, "", Outcome.CORRECT),  # a model without think tags may answer
        (f"well {RIGHT} done", "", Outcome.CORRECT),
        (f"<think>3+8</think>{RIGHT}", "", Outcome.CORRECT),
        (f"3+8</think>{RIGHT}", "<think>", Outcome.CORRECT),
        (f"3+8</think>{RIGHT}", "", Outcome.CORRECT),  # the template opened it, and did not say so
        (f"<answer>1</answer>, no</think>{RIGHT}", "<think>", Outcome.CORRECT),  # musing is free
        (RIGHT, "<think>", Outcome.NO_ANSWER),  # inside of the thinking
        (f"<think>{RIGHT}", "", Outcome.NO_ANSWER),
        (f"<think>{RIGHT}</think>", "", Outcome.NO_ANSWER),
        (f"{RIGHT}{RIGHT}", "", Outcome.NO_ANSWER),
        (f"<think>x</think>{RIGHT}<answer>3+8</answer>", "", Outcome.NO_ANSWER),
        (f"<think>x</think>{RIGHT}<think>y</think>", "", Outcome.NO_ANSWER),
        (f"<think>x</think><answer>3+8</answer><think>y</think>{RIGHT}", "", Outcome.NO_ANSWER),
        (f"x</think><answer>3+8</answer></think>{RIGHT}", "<think>", Outcome.NO_ANSWER),
        (f"<think>x</think>{RIGHT}", "<think>", Outcome.NO_ANSWER),  # opened twice
        (f"<think>x</think>{RIGHT}<think>", "", Outcome.NO_ANSWER),
        ("<answer>3*8", "", Outcome.NO_ANSWER),
        ("3*8</answer>", "", Outcome.NO_ANSWER),
        ("</answer>3*8<answer>", "", Outcome.NO_ANSWER),
        ("<answer>3*8<answer>3*8</answer>", "", Outcome.NO_ANSWER),
        ("<answer>3*8</answer></answer>", "", Outcome.NO_ANSWER),
        ("<answer></answer>", "", Outcome.NO_ANSWER),
        ("<answer> \n </answer>", "", Outcome.NO_ANSWER),
        ("<ANSWER>3*8</ANSWER>", "", Outcome.NO_ANSWER),
        ("3*8", "", Outcome.NO_ANSWER),
        ("", "", Outcome.NO_ANSWER),
        ("</think>" * 1000, "", Outcome.NO_ANSWER),
    ],
)
def test_where_an_answer_counts(completion, prefill, expected):
    assert verify([3, 8], 24, completion, prefill=prefill).outcome is expected


def test_a_truncated_completion_is_worth_nothing_and_a_failed_one_has_no_reward():
    assert verify([3, 8], 24, RIGHT, status="length").outcome is Outcome.TRUNCATED
    assert verify([3, 8], 24, RIGHT, status="length").reward == 0
    assert verify([3, 8], 24, RIGHT, status="error").reward is None


@pytest.mark.parametrize(
    ("nums", "target"),
    [
        (None, 24),
        ("38", 24),
        (38, 24),
        ([], 24),
        (["3", "8"], 24),
        ([3.0, 8], 24),
        ([True, 8], 24),
        ([-3, 8], 24),
        ([[3], 8], 24),
        ([3, 8], "24"),
        ([3, 8], 24.0),
        ([3, 8], None),
        ([3, 8], True),
    ],
)
def test_a_broken_row_is_unscorable_not_wrong(nums, target):
    verdict = verify(nums, target, RIGHT)
    assert verdict.outcome is Outcome.GOLD_UNPARSEABLE
    assert verdict.reward is None
    assert verdict.detail


def test_reward_function_has_the_signature_of_trl():
    seen = []
    rewards = countdown_reward(
        prompts=["p"] * 5,
        completions=[
            RIGHT,
            "<answer>3+8</answer>",
            RIGHT,
            [{"role": "assistant", "content": RIGHT}],
            RIGHT,
        ],
        completion_ids=[[1]] * 5,
        nums=[[3, 8], [3, 8], ["x"], [3, 8], [3, 8]],
        target=[24] * 5,
        status=["stop", "stop", "stop", "stop", "length"],
        log_verdict=lambda verdicts: seen.extend(v.outcome.value for v in verdicts),
        trainer_state=None,
    )
    assert rewards == [1.0, 0.0, None, 1.0, 0.0]
    assert seen == ["correct", "wrong", "gold_unparseable", "correct", "truncated"]
    assert countdown_reward(["p"], [RIGHT], nums=[[3, 8]], target=[24]) == [1.0]  # without what is ours
