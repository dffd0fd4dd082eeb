"""``make parity`` in the tests: every loss beside plain loops, and beside TRL's own code where TRL is installed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grpo.config.algorithm import LOSS_TYPES
from grpo.losses import LOSSES
from tests.parity.__main__ import BEGIN, END, PAGE
from tests.parity.cases import Case, cases
from tests.parity.compare import _compared, adaptive_entropy, beside_reference, beside_trl, of_reference
from tests.parity.ours import gradient_of, our_loss, posed

BY_NAME = {case.name: case for case in cases()}


@pytest.mark.parametrize("name", BY_NAME)
def test_beside_plain_loops(name: str) -> None:
    line = beside_reference(BY_NAME[name])
    assert line.passes, line


@pytest.mark.slow
def test_beside_trl() -> None:
    pytest.importorskip("trl")
    found = [beside_trl(case) for case in cases() if case.trl is not None] + [adaptive_entropy()]
    assert len(found) > 30
    assert [line for line in found if not line.passes] == []


def test_every_loss_type_is_compared() -> None:
    assert {case.options["loss_type"] for case in cases()} == set(LOSSES) == set(LOSS_TYPES)


@pytest.mark.parametrize("name", [name for name in BY_NAME if ", " in name and "sequence_token" not in name])
def test_every_option_changes_something(name: str) -> None:
    """Or its line would say nothing."""
    case = BY_NAME[name]
    loss_type = case.options["loss_type"]
    plain = Case("", {"loss_type": loss_type} | ({"epsilon_high": 1.3} if loss_type == "cispo" else {}))
    changed = [
        float((gradient_of(our_loss, posed(case, s))[0] - gradient_of(our_loss, posed(plain, s))[0]).norm())
        for s in range(4)
    ]
    assert max(changed) > 1e-3


def test_a_wrong_loss_is_found() -> None:
    """The comparison can fail."""
    case = BY_NAME["dapo, epsilon_high"]
    wrong = Case(case.name, case.options | {"epsilon_high": 0.2})
    assert _compared(case, "", lambda problem: of_reference(replace(problem, case=case))).passes
    assert not _compared(wrong, "", lambda problem: of_reference(replace(problem, case=case))).passes


def test_the_page_has_a_line_for_every_case() -> None:
    written = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    for name in [*BY_NAME, "dapo, use_adaptive_entropy"]:
        assert f"| {name} |" in written
    assert "| NO" not in written
