"""The form of search traces: all that data/traces.py writes reads well, and every fault is told by its name."""

from __future__ import annotations

import pytest

from data import traces
from data.trace_form import AFTER, ARITHMETIC, CUT, REPEATED, SHAPE, VERDICT, faults, form

GOOD = (
    "<think> 6 + 3 = 9 , 9 + 9 = 18 ? 27 < 6 * 3 = 18 , 18 + 9 = 27 ? 27 yes </think> <answer> ( 6 * 3 ) + 9 </answer>"
)


def test_all_traces_read_well():
    rows = traces.rows("train", 300, give_up=(0.3, 0.2), longest=30, max_number=13, max_target=100)
    assert [row["completion"] for row in rows if faults(row["completion"])] == []
    assert form(["p"] * 2, [GOOD, rows[0]["completion"]]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("9 + 9 = 18", "9 + 9 = 19", ARITHMETIC),
        ("6 + 3 = 9", "6 / 4 = 1", ARITHMETIC),
        ("6 + 3 = 9", "6 / 0 = 9", ARITHMETIC),
        ("? 27 <", "? 27 >", VERDICT),
        ("? 27 <", "? 27 yes", VERDICT),
        ("9 + 9 = 18 ? 27 <", "9 + 9 = 18 ? 27 < 6 + 3 = 9 , 9 + 9 = 18 ? 27 <", REPEATED),
        ("yes </think>", "yes 6 - 3 = 3 , 9 - 3 = 6 ? 27 < </think>", AFTER),
        ("</answer>", "</answer> <answer> 1 </answer>", SHAPE),
        ("</answer>", "</answer> so", SHAPE),
        ("+ 9 </answer>", "+ 9", SHAPE),
        ("<think>", "<think> wait", SHAPE),
        ("6 + 3 = 9 , ", "6 + 3 = 9 9 , ", SHAPE),
        ("( 6 * 3 ) + 9", "", SHAPE),
        ("6 + 3 = 9", f"6 + 3 = {'9' * 5000}", ARITHMETIC),
    ],
)
def test_a_fault_is_told(old, new, fault):
    text = GOOD.replace(old, new, 1)
    assert fault in faults(text)
    assert form(["p"], [text]) == [0.0]


def test_how_a_completion_ended_counts_too():
    cut = GOOD[: GOOD.index("yes")]
    assert faults(GOOD) == []
    assert faults("") == [SHAPE]
    assert faults(cut, "length") == [CUT, SHAPE]
    assert form(["p"] * 3, [GOOD, GOOD, cut], ["stop", "error", "length"]) == [1.0, None, 0.0]


def test_an_attempt_in_another_order_is_another_attempt():
    text = GOOD.replace("? 27 <", "? 27 < 9 + 3 = 12 , 12 + 6 = 18 ? 27 <")
    assert faults(text) == []
