"""The math verifier: where the answer stands, what it equals, and what a policy must not get away with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards.math import check_row, gold_fault, math_reward, verify
from rewards.verdict import Outcome

FUZZ_EXAMPLES = int(os.environ.get("GRPO_FUZZ_EXAMPLES", "300"))


def boxed(piece: str) -> str:
    return f"The answer is $\\boxed{{{piece}}}$."


# What other verifiers were seen to accept.
@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("12", boxed("1 2")),
        ("42", boxed("42\\%")),
        ("", boxed("")),
        ("10", boxed("10.0009")),
        ("100", boxed("1")),
        ("42", boxed("41=42")),
        ("42", boxed("0=42")),
        ("5", boxed("y=7=5")),
        ("\\frac{1}{3}", boxed("0.333333")),
        ("0.333333", boxed("\\frac{1}{3}")),
        ("\\frac{1}{2^{99}}", boxed("1/2^98")),
        ("10^{-20}", boxed("10^{-30}")),
        ("\\frac{1}{2004!}", boxed("\\frac{1}{2006!}")),
        ("\\sin(1)", boxed("\\sin(1)+2^{-999}")),
        ("\\sin(10^{-20})", boxed("\\sin(10^{-30})")),
        ("\\{1,2\\}", boxed("(1,2)")),
        ("(1,2)", boxed("\\{1,2\\}")),
        ("1, 2", boxed("(1,2)")),
        ("8", "\\boxed{9} The final answer is $8$. I hope it is correct."),
        ("8", "\\boxed{} The final answer is $8$. I hope it is correct."),
        ("3x-y+13=0", boxed("3x+4y+14=0")),
        ("42", "\\boxed{41,42}"),
        ("42", "\\boxed{1} or \\boxed{42}"),
        ("42", "<answer>\\boxed{1} or \\boxed{42}</answer>"),
        ("42", "<answer>42</answer> <answer>42</answer>"),
        ("42", boxed("[open('f','w').write('x')]\\pi")),
        ("Monday", boxed("\\text{Monday or Tuesday}")),
        ("1764", boxed("42 \\text{ squared}")),
        ("42", boxed("42 \\text{ squared}")),
        ("42", boxed("42 \\text{ thousand}")),
        ("x", boxed("\\frac{d}{dx} x^2")),
        ("(B)", boxed("(A) or (B)")),
        ("11", boxed("1011_2 \\text{ or } 11")),
        ("1011_2", boxed("11")),
    ],
)
def test_wrong(gold, completion):
    assert verify(gold, completion).reward != 1.0


# What other verifiers were seen to refuse.
@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("42", boxed("42.0")),
        ("1000", boxed("1,000")),
        ("x+1", boxed("1+x")),
        ("2\\sqrt{3}", boxed("\\sqrt{12}")),
        ("0.5", boxed("1/2")),
        ("\\frac{1}{2}", boxed("\\dfrac12")),
        ("42", boxed("42 \\text{ miles}")),
        ("1024", boxed("2^{10}")),
        ("5", boxed("10/2")),
        ("42", "\\boxed{41} ... \\boxed{42}"),
        ("42", "<answer>42</answer>"),
        ("5000", boxed("5\\,000")),
        ("[3,\\infty)", boxed("x \\ge 3")),
        ("[3,∞)", boxed("x≥3")),
        ("42", boxed("42 cm^2")),
        ("90^\\circ", boxed("\\frac{\\pi}{2}")),
        ("\\frac{\\pi}{2}", boxed("90^\\circ")),
        ("5", boxed("x = 5")),
        ("42\\%", boxed("42")),
        ("\\sin x", boxed("\\cos(\\frac{\\pi}{2} - x)")),
        ("\\log_2 8", boxed("3")),
        ("\\sin\\frac{\\pi}{6}", boxed("0.5")),
        ("\\sqrt{5+2\\sqrt{6}}", boxed("\\sqrt{2}+\\sqrt{3}")),
        ("(n+1)!", boxed("(n+1) \\cdot n!")),
    ],
)
def test_right(gold, completion):
    verdict = verify(gold, completion, timeout=20.0)
    assert verdict.outcome is Outcome.CORRECT, verdict


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("<answer>42</answer>", Outcome.CORRECT),
        ("\\boxed{1} <answer>42</answer>", Outcome.CORRECT),
        ("<answer>the answer is $42$</answer>", Outcome.CORRECT),
        ("work\n#### 42", Outcome.CORRECT),
        ("<think>\\boxed{1}</think>\\boxed{42}", Outcome.CORRECT),
        ("\\fbox{42}", Outcome.CORRECT),
        ("\\boxed{\\boxed{42}}", Outcome.CORRECT),
        ("42", Outcome.NO_ANSWER),
        ("\\boxed{42", Outcome.NO_ANSWER),
        ("\\boxed{42} \\boxed{", Outcome.NO_ANSWER),
        ("\\boxed{} 42", Outcome.NO_ANSWER),
        ("<answer></answer>\\boxed{42}", Outcome.NO_ANSWER),
        ("<answer>42", Outcome.NO_ANSWER),
        ("<think>\\boxed{42}", Outcome.NO_ANSWER),
        ("#### 42\nor so", Outcome.NO_ANSWER),
        ("\\boxed{4\x002}", Outcome.UNPARSEABLE),
        ("\\boxed{" + "1+" * 300 + "1}", Outcome.UNPARSEABLE),
        ("\\boxed{" + "(" * 51 + "42" + ")" * 51 + "}", Outcome.UNPARSEABLE),
        ("\\boxed{9^{9^{9^9}}}", Outcome.UNPARSEABLE),
        ("\\boxed{7^{30000000}}", Outcome.UNPARSEABLE),
        ("\\boxed{((9!)!)!}", Outcome.UNPARSEABLE),
        ("\\boxed{10000000!}", Outcome.UNPARSEABLE),
        ("\\boxed{\\binom{1000000}{500000}}", Outcome.UNPARSEABLE),
        ("\\boxed{\\sum_{k=1}^{42} 1}", Outcome.UNPARSEABLE),
        ("\\boxed{\\int_0^{42} 1 \\, dx}", Outcome.UNPARSEABLE),
        ("\\boxed{1/0}", Outcome.UNPARSEABLE),
        ("\\boxed{41}", Outcome.WRONG),
        ("\\boxed{x^2}", Outcome.WRONG),
    ],
)
def test_outcomes(completion, outcome):
    verdict = verify("42", completion)
    assert verdict.outcome is outcome, verdict


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("So it is 42.", True),
        ("Total: $1,234.50", False),
        ("It costs $42", True),
        ("so\n**42**", True),
        ("42 apples", True),
        ("Either 41 or 42", False),
        ("41, 42", False),
        ("It is 41/42", False),
        ("42 or more", False),
        ("42 thousand", False),
        ("x42", False),
        ("42%", False),
        ("42\nThat is it", False),
    ],
)
def test_a_plain_number_counts_where_it_is_allowed_and_ends_the_text(completion, right):
    assert verify("42", completion, plain_number=True).reward == float(right)
    assert verify("42", completion).outcome is Outcome.NO_ANSWER


def test_status_and_prefill():
    assert verify("42", boxed("42"), status="length").outcome is Outcome.TRUNCATED
    assert verify("42", boxed("42"), status="error").reward is None
    assert verify("42", "so </think> \\boxed{42}", prefill="<think>").reward == 1.0
    assert verify("42", "so \\boxed{42}", prefill="<think>").outcome is Outcome.NO_ANSWER


@pytest.mark.parametrize(
    "gold",
    [
        "72",
        72,
        0.5,
        "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72",
        "We get $x = 2$, hence $\\boxed{\\frac{3}{4}}$.",
        "Monday",
        "(B)",
        "10:30 a.m.",
        "\\overline{AB}",
        "\\begin{pmatrix} \\cos t \\\\ \\sin t \\end{pmatrix}",
        "\\{1\\pm\\sqrt{5},-2\\}",
        "y = -\\frac{1}{4}x+\\frac{5}{2}",
        "x^2+y^2=25",
        "\\log_2 3",
    ],
)
def test_a_good_gold_answer(gold):
    assert gold_fault(gold) is None
    assert check_row({"answer": gold}) is None


@pytest.mark.parametrize(
    "gold",
    ["", "  ", "####", "\\boxed{}", "\\frac{1}{", "1+", "1 2", "9" * 600, None, True, [42], "7^{30000000}", "\x00"],
)
def test_a_broken_gold_answer_scores_nobody(gold):
    reason = gold_fault(gold)
    assert isinstance(reason, str)
    assert reason
    assert "\n" not in reason
    assert check_row({"answer": gold})
    verdict = verify(gold, boxed("42"))
    assert (verdict.outcome, verdict.reward) == (Outcome.GOLD_UNPARSEABLE, None)


@pytest.mark.parametrize(
    "gold",
    [
        "The series converges by the ratio test. It is absolutely convergent.",
        "we multiply both sides by the common denominator and then collect all terms of equal degree to get zero",
    ],
)
def test_prose_is_refused_by_name(gold):
    assert "prose" in gold_fault(gold)


def test_it_is_a_library_without_the_trainer():
    code = r"""
import sys
from rewards.math import gold_fault, verify
assert verify("72", r"so \boxed{72}").reward == 1.0 and gold_fault("1+") and gold_fault("72") is None
print(sorted(sys.modules.keys() & {"torch", "transformers", "grpo", "numpy", "sympy", "math_verify", "accelerate"}))
"""
    heard = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert heard.stdout.strip() == "[]"


def test_reward_function_has_one_entry_a_completion():
    heard = []
    completions = [boxed("42"), [{"role": "assistant", "content": boxed("41")}], boxed("42"), boxed("\\log_2 8")]
    rewards = math_reward(
        ["q"] * 4,
        completions,
        answer=["42", "42", "\\frac{", "3"],
        status=["stop"] * 4,
        timeout=20.0,
        log_verdict=heard.append,
    )
    assert rewards == [1.0, 0.0, None, 1.0]
    assert [verdict.outcome.value for verdict in heard[0]] == ["correct", "wrong", "gold_unparseable", "correct"]
    assert math_reward(["q"], ["42"], answer=["42"], plain_number=True) == [1.0]
    with pytest.raises(ValueError, match="zip"):
        math_reward(["q"] * 2, ["1", "2"], answer=["1"])


# --- no text breaks it -----------------------------------------------------------------------------------------------

_PIECES = r"""
\boxed{ } { ( ) [ ] <answer> </answer> <think> </think> #### \frac \sqrt \pi \text{ $ \$ \% % ^ _ , ; = < > \le \pm \cup
\{ \} \infty \begin{pmatrix} \end{pmatrix} & \\ ! | - + * / . 0 1 42 999 x y i e or and \sin \log
"""
PIECES = st.sampled_from(
    [*_PIECES.split(), " ", "\n", "\x00", "\u00b2", "\u221a", "\u00bd", "\ud800", "\uff10", "\u0661"]
)
SOUP = st.lists(PIECES, max_size=30).map("".join)
LABELLED = [
    json.loads(line) for line in (Path(__file__).parent / "math_labelled.jsonl").read_text("utf-8").splitlines()
]


@st.composite
def mutated(draw):
    """A labelled completion with parts of it cut out, doubled or replaced."""
    text = draw(st.sampled_from(LABELLED))["completion"]
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
        text = text[:start] + draw(st.one_of(PIECES, st.just(text[start:end] * 2), st.just(""))) + text[end:]
    return text[:2000]


TEXTS = st.one_of(
    mutated(), SOUP, SOUP.map(lambda soup: f"\\boxed{{{soup}}}"), st.text(max_size=60).map(boxed), st.text()
)
GOLDS = st.one_of(st.sampled_from(LABELLED).map(lambda row: row["gold"]), SOUP)


@pytest.mark.timeout(0 if FUZZ_EXAMPLES > 1000 else 120)
@settings(max_examples=FUZZ_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(gold=GOLDS, completion=TEXTS)
def test_no_text_raises_or_takes_long(gold, completion):
    started = time.monotonic()
    verdict = verify(gold, completion, plain_number=True, timeout=1.0)
    assert verdict.reward in (None, 0.0, 1.0)
    assert time.monotonic() - started < 30  # a gold answer may take 10 s, and workers start again


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 100_000,
        "\\boxed{" + "9" * 1_000_000 + "}",
        "{" * 1_000_000 + "\\boxed{42}",
        "\\boxed{42}, " * 80_000,
        "<answer>" + "4" * 1_000_000 + "</answer>",
        "#### " + "4" * 1_000_000,
        "a " * 500_000,
        "$" * 1_000_000,
        "1," * 500_000,
        "\U0001d7d2" * 250_000,
        "<answer>" + "a" * 1_000_000 + " $42$ </answer>",
        "<answer>" + "$4$ " * 200_000 + "</answer>",
        "\\boxed " * 150_000,
    ],
    ids=range(13),
)
def test_a_megabyte_takes_no_time(text):
    started = time.monotonic()
    assert verify("42", text, plain_number=True).reward in (0.0, 1.0)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("gold", "answer", "is_number"),
    [
        *(("43", "43", True), ("43", "19 + 24", False), ("43", "x = 43", True), ("43", "43 \\text{ apples}", True)),
        *(("5", "10/2", False), ("5", "5.0", True), ("1/2", "\\frac{2}{4}", True), ("1/2", "1/4 + 1/4", False)),
        *(("1024", "2^{10}", False), ("1024", "1,024", True), ("-3", "-3", True), ("6", "3!", False)),
        *(("x+1", "1+x", True), ("2\\sqrt{3}", "\\sqrt{12}", True)),  # of a gold that is no number nothing is asked
    ],
)
def test_an_answer_that_has_still_to_be_worked_out(gold: str, answer: str, is_number: bool) -> None:
    completion = f"\\boxed{{{answer}}}"
    assert verify(gold, completion).outcome is Outcome.CORRECT
    assert (verify(gold, completion, evaluated=True).outcome is Outcome.CORRECT) is is_number
